"""Exercise checks, one module a chapter: `gclib.course.checks.ch01.info_nce(answer)` judges an answer and says why.

`engine` judges, `running` calls an answer safely, `comparing` puts values side by side in words, `progress`
remembers verdicts, `predictions` keeps what the learner expected before measuring. Chapters only declare.
"""
