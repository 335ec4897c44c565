"""Exercise checks, one module a chapter: `gclib.course.checks.ch01.info_nce(answer)` judges an answer and says why.

A misconception of chapter 05 is named in `ch05.py`: each `Exercise` lists its own, as `Misconception(name, message,
wrong)`, where `wrong` does what people who hold it do. `judging` runs an answer and recognises the misconception behind
it, `engine` puts the verdict in words, `running` calls an answer safely, `comparing` puts values side by side,
`progress` remembers verdicts, `predictions` keeps what the learner expected, and `record` looks back on both.
"""
