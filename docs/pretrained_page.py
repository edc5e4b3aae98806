"""What docs/pretrained.md says of the files of the default pair, as the code that fetches them knows them."""

from pathlib import Path

from tokenfusion.models.pretrained import local_name, place_on_hub, weighted_names
from tokenfusion.preset import PRETRAINED_PAIR

PAGE = Path(__file__).parent / "pretrained.md"


def files() -> str:
    """Where the weights of both parents are on the hub, and how to fetch and give them."""
    names = weighted_names(PRETRAINED_PAIR)
    places, commands = [], []
    for name in names:
        repo, revision, file = place_on_hub(name)
        at = f" at `{revision}`" * bool(revision)
        places.append(f"- `{name}`: `{file}` of the repository `{repo}`{at}, here `{local_name(name)}`")
        option = f" --revision {revision}" * bool(revision)
        commands.append(f"hf download {repo} {file}{option} --local-dir . && mv {file} {local_name(name)}")
    commands.append(f"tokenfusion train photos/ --pretrained {' '.join(map(local_name, names))} --out runs/photos")
    return "\n".join([*places, "", "```sh", *commands, "```"])
