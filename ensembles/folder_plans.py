"""An ensemble of a repository -> its plan; what is wrong with it is told with its place in config.pbtxt."""

from tutti.core import files
from tutti.core.errors import ConfigError
from tutti.ensembles import lines
from tutti.ensembles.graph import ConfigOf, GraphError, Plan
from tutti.ensembles.planner import plan
from tutti.repository import config
from tutti.repository.folders import ModelFolder


def planned(folder: ModelFolder, config_of: ConfigOf) -> Plan:
    """As `planner.plan`. Raises ConfigError."""
    try:
        return plan(folder.config, config_of)
    except GraphError as error:
        line = _line(folder, error.path)
        where = f" ({folder.path.name}/config.pbtxt:{line})" if line else ""
        raise GraphError(f"{error}{where}", error.path) from None


def _line(folder: ModelFolder, path: str) -> int:
    """0 where the file does not say it: a client may have sent another configuration."""
    file = folder.path / "config.pbtxt"
    try:
        is_own = config.load(file).proto.ensemble_scheduling == folder.config.proto.ensemble_scheduling
        return lines.line_of(files.read_text(file), path) if is_own else 0
    except (ConfigError, OSError):
        return 0
