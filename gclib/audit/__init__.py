"""Is the step that you use right?

`audit` tries a step and names what is wrong with it, `gradients` compares two gradients, `zoo` tries all the
architectures of `architectures`. `calls` notes what a step does, `copies` keeps the caller's own things untouched.
"""
