"""In which order ensembles are loaded: after those that they use. Pure."""

from tutti.repository.folders import ModelFolder


def in_order_of_use(ensembles: list[ModelFolder]) -> list[ModelFolder]:
    """Ensembles after the ensembles they use; one that takes part in a cycle comes where it stands."""
    by_name = {folder.config.name: folder for folder in ensembles}
    ordered: dict[str, ModelFolder] = {}

    def visit(folder: ModelFolder, path: tuple[str, ...]) -> None:
        name = folder.config.name
        if name in ordered or name in path:
            return
        for step in folder.config.steps:
            if step.model_name in by_name:
                visit(by_name[step.model_name], (*path, name))
        ordered[name] = folder

    for folder in ensembles:
        visit(folder, ())
    return list(ordered.values())
