"""What `docs/serve.md` tells of `benchmarks/results/serve.json`."""

import json
import re
from pathlib import Path
from typing import Any

from results_page import table

DOCS = Path(__file__).parent
PAGE = DOCS / "serve.md"
RESULT = DOCS.parent / "benchmarks" / "results" / "serve.json"
Row = dict[str, Any]
"""What was measured of one exported classifier."""


def figures() -> str:
    """Throughput, times, and what the service survives."""
    if not RESULT.exists():
        return "Not measured yet: `python benchmarks/serve.py --help`."
    found = json.loads(RESULT.read_text())
    rows: list[Row] = found["exports"]
    parts = [
        f"On {' and '.join(sorted({row['hardware'] for row in rows}))}, which the client shares; the column `client` "
        f"says what it takes of them. {rows[0]['images']['count']} photographs as JPEG, "
        f"{rows[0]['images']['mean_bytes'] / 1000:.0f} kB each, one a request. `predict` and the graph are the "
        "runtime's in one process, at the batch that the service forms; the graph alone has its images decoded before. "
        f"{loads(rows)}",
        throughput([row for row in rows if "throughput" in row]),
        short([row for row in rows if "throughput" in row]),
        latency([row for row in rows if "latency" in row]),
        *(peer(row) for row in rows if "peer" in row),
        *(burst(row) for row in rows if "burst" in row),
        *(memory(row) for row in rows if "memory" in row),
        *(malformed(row) for row in rows if "told" in row.get("malformed", {})),
        *(kill(row) for row in rows if "kill" in row),
    ]
    return "\n\n".join(parts)


def loads(rows: list[Row]) -> str:
    """How busy the machine was when the parts began."""
    before = [part["load_average_before"][0] for row in rows for part in row["measured"].values()]
    return (
        f"In the minute before a part began {min(before):g} to {max(before):g} processes on average wanted a core, "
        "those of the part before among them. Each part is a run of its own, and its figures are for comparing within."
    )


def name_of(row: Row) -> str:
    cpu = re.search(r"model \d+", row["hardware"])
    return f"{row['img_size'][0]} px, {row['format']} {row['precision']}, {cpu.group() if cpu else row['hardware']}"


def throughput(rows: list[Row]) -> str:
    """Images a second beside the runtime alone."""
    heading = ["64 clients", "images/s", "images a batch", "of `predict` alone (aim: 85 %)", "of the graph alone"]
    heading += ["CPU ms an image: service", "`predict`", "graph", "client"]
    lines = []
    for row in rows:
        one = row["throughput"]
        shares = (f"{one['share_of_predict']:.0%}", f"{one['share_of_graph']:.0%}")
        cpu = (one["service_cpu_ms_an_image"], one["predict_cpu_ms_an_image"], one["graph_cpu_ms_an_image"])
        cells = (f"{one['images_per_s']:,.0f}", f"{one['images_of_a_batch']:.1f}", *shares)
        lines.append([name_of(row), *cells, *(f"{ms:.2f}" for ms in cpu), f"{one['client_share_of_cores']:.1%}"])
    return table(heading, lines)


def short(rows: list[Row]) -> str:
    """Why the aim is missed where it is."""
    said = []
    for row in rows:
        one = row["throughput"]
        if one["share_of_predict"] < 0.85:
            image = one["predict_cpu_ms_an_image"]
            more = one["service_cpu_ms_an_image"] - image
            used = one["images_per_s"] * one["service_cpu_ms_an_image"] / 1000
            said.append(
                f"At {name_of(row)} the aim is missed: an image takes {image:.1f} ms of a core by itself, and its "
                f"request, HTTP and what BentoML does around it, {more:.1f} ms more, in one process, of which Python "
                f"runs one thread at a time. The service used {used:.1f} cores meanwhile."
            )
    of_graph = ", ".join(f"{row['throughput']['share_of_graph']:.0%}" for row in rows)
    chosen = (
        "What the aim calls the runtime alone is taken to be its `predict`, which decodes the same files; of the graph "
        f"alone, whose images are decoded before, it is {of_graph}."
    )
    return " ".join([*said, chosen])


def latency(rows: list[Row]) -> str:
    """Times at parts of that throughput."""
    lines = [
        [
            *(name_of(row), load, f"{one['arrivals_per_s']:,.0f}", *times(one)),
            *(f"{one['refused_429'] / one['requests']:.0%}", f"{one['client_share_of_cores']:.1%}"),
        ]
        for row in rows
        for load, one in row["latency"].items()
    ]
    heading = ["requests that arrive by chance", "of the above", "a second", "p50 ms", "p99 ms", "429", "client"]
    return table(heading, lines)


def times(one: Row) -> tuple[str, str]:
    return f"{one['p50_ms']:.0f}", f"{one['p99_ms']:.0f}"


def peer(row: Row) -> str:
    """LitServe beside ours."""
    one = row["peer"]
    ours, theirs = one["images_per_s"]["ours"], one["images_per_s"]["litserve"]
    (p50, p99), (their_p50, their_p99) = times(one["60 %"]["ours"]), times(one["60 %"]["litserve"])
    return (
        f"**Beside LitServe** {one['version']} with the same runtime and batch size (32), in turns, {name_of(row)}: "
        f"{ours:,.0f} images/s against {theirs:,.0f}, {ours / theirs:.2f} times. Where "
        f"{one['60 %']['ours']['arrivals_per_s']:,.0f} requests a second arrive by chance, half are answered within "
        f"{p50} ms and 99 % within {p99}; LitServe's within {their_p50} and {their_p99}. Without an answer were "
        f"{unanswered(one, 'ours')} and {unanswered(one, 'litserve')}."
    )


def unanswered(one: Row, side: str) -> str:
    """How many requests of a side's turns had none, or 429."""
    turns = [*one["turns"][side], one["60 %"][side]]
    short = sum(turn["requests"] - turn["answered"] for turn in turns)
    return f"{short:,} of {sum(turn['requests'] for turn in turns):,}{' of ours' if side == 'ours' else ' of its'}"


def burst(row: Row) -> str:
    """Many connections at once."""
    hasty, patient = row["burst"]["hasty"], row["burst"]["patient"]
    return (
        f"**A burst**, {name_of(row)}: {hasty['requests']:,} requests over {hasty['clients']} connections that do not "
        f"wait: {hasty['answered']:,} answered, {hasty['refused_429']:,} got 429, {other(hasty)}. With clients "
        f"that ask again after a second: {patient['answered']:,} answered, {other(patient)}. "
        f"{wrong(hasty['wrong'] + patient['wrong'])}; scores differ from those of the image alone by "
        f"{max(hasty['farthest_score'], patient['farthest_score']):.1g} at most."
    )


def other(one: Row) -> str:
    """What became of the rest."""
    return f"{one['lost'] + one['otherwise']:,} otherwise"


def wrong(count: int) -> str:
    return "No answer was wrong" if not count else f"{count:,} answers were wrong"


FLAT = 0.02
"""Growth of memory in the second half of the requests that counts as none."""


def memory(row: Row) -> str:
    """What 20,000 requests leave."""
    one = row["memory"]
    early, half, last = one["rows"][2], one["rows"][len(one["rows"]) // 2], one["rows"][-1]
    growth = last["mb"] / half["mb"] - 1
    grown = f"{growth:+.0%} in the second half" + ", where it should be flat" * (growth > FLAT)
    faults = "none lost, refused or wrong" if not one["faults"] else f"not all answered rightly ({one['faults']})"
    return (
        f"**Memory**, {name_of(row)}: {early['mb']:.0f} MB after {early['requests']:,} requests, {last['mb']:.0f} at "
        f"{last['requests']:,} ({grown}), {faults}; file handles {early['handles']} and {last['handles']}, threads "
        f"{early['threads']} and {last['threads']}. After its end {one['processes_left']} processes and "
        f"{one['files_left']} temporary files are left."
    )


def malformed(row: Row) -> str:
    """What 200 requests that are none are told."""
    one = row["malformed"]
    heading = [f"{one['requests']} malformed requests, {name_of(row)}", "told"]
    told = {kind: ", ".join(f"{n} × {status}" for status, n in found.items()) for kind, found in one["told"].items()}
    return (
        f"{table(heading, [list(line) for line in told.items()])}\n\n{one['workers_lost']} workers were lost, and "
        f"{one['right_afterwards']} of 20 requests afterwards answered rightly. A JPEG with some bytes overwritten may "
        "well be one still: it is answered as `predict` answers the same file."
    )


def kill(row: Row) -> str:
    """What SIGKILL of a worker costs."""
    parts = []
    for workers, one in row["kill"].items():
        again = "each of which was answered when asked again"
        if one["lost_when_asked_again"]:
            again = f"of which {one['lost_when_asked_again']} were not answered when asked again at once"
        refused = f", and {one['refused_429']} got 429" if one["refused_429"] else ""
        answered = one["requests"] - one["lost"] - one["refused_429"]
        parts.append(
            f"of {workers}, {answered} of {one['requests']:,} requests were answered, half of them within "
            f"{one['p50_ms']:.0f} ms, {one['lost']} lost "
            f"their answer, {again}{refused}; "
            f"{one['seconds_without_an_answer']:.1f} s went by without an answer"
        )
    return (
        f"**SIGKILL of a worker**, {name_of(row)}, while {one['arrivals_per_s']:,.0f} requests a second arrive: "
        f"{'; '.join(parts)}."
    )
