"""Tables and pictures of what the runs of a study came to."""


def report(study, results): ...
