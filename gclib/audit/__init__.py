"""Is the step that you use right?"""
