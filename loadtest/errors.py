"""What a person is told when a load test cannot be: one line each. Knows nothing of how they are shown."""


class ScenarioError(ValueError):
    """A command, a scenario or a file that cannot be run; names it, what was expected, and a near name."""


class RunError(RuntimeError):
    """The run could not be made; says why."""
