"""What `docs/export.md` tells of `benchmarks/results/export.json` and `cold.json`."""

import re

from results_page import RESULTS, listed, load, load_before, table


def shipped() -> str:
    """How fast classifiers are as they are shipped, against the peer's eager fp32."""
    if not (RESULTS / "export.json").exists():
        return "Not measured yet: `python benchmarks/export.py --out benchmarks/results/export.json`."
    found = load("export")
    ways = ("ours eager fp32", "ours eager bf16", "ours openvino fp32", "ours openvino bf16", "ours openvino int8")
    ways += ("ours onnx fp32", "ours onnx int8", "peer eager bf16", "peer openvino fp32", "peer openvino bf16")
    ways += ("peer openvino int8",)
    rows, missed, slower, notes = [], [], [], []
    for result in found["results"]:
        costs = "{ours:.2f} / {peer:.2f}".format(**result["gmacs"])
        for key in ("batch 1", "batch 8"):
            against, peak = result[key]["times_the_peer"], result[key]["share_of_peak"]["ours openvino bf16"]
            cells = [f"{against[way]:.2f}×" if way in against else "not exported" for way in ways]
            name = f"`{result['model']}`"
            rows.append([name, result["peer"], costs, key.removeprefix("batch "), *cells, f"{peak:.0%}"])
            for precision, aim in (("bf16", 3), ("int8", 5)):
                if (times := against[f"ours openvino {precision}"]) < aim:
                    missed.append(f"{name} at {key} in {precision} ({times:.2f}× of {aim}×)")
        for way in result["batch 1"]["times_the_peer"]:
            times = [result[key]["times_the_peer"][way] for key in ("batch 1", "batch 8")]
            if way.startswith(("ours onnx", "ours openvino")) and min(times) < 1:
                slower.append("{} as {} ({:.2f}× and {:.2f}×)".format(name, way.removeprefix("ours "), *times))
        notes += [f"{name}, {re.sub(r'! For more information[^;]*', '', note)}" for note in result["notes"]]
    measured = [result["model"] for result in found["results"]]
    unmeasured = [f"`{name}`" for name in found["models"] if name not in measured]
    peaks = ", ".join(
        f"{min(gflops):,.0f} to {max(gflops):,.0f} GFLOP/s in {precision}"
        for precision in found["results"][0]["peak_gflops"]
        if (gflops := [result["peak_gflops"][precision] for result in found["results"]])
    )
    heading = ["model", "peer", "GMACs, ours / peer", "batch", *ways, "share of the bf16 peak"]
    return (
        f"Images per second over those of the peer in PyTorch, fp32, on {found['hardware']}, {found['threads']} "
        f"threads; its fastest matrix products reach {peaks}. The share is that of `ours openvino bf16`. int8 is "
        f"calibrated on made-up images here: its accuracy is the gate's business, not this table's.\n\n"
        f"{table(heading, rows)}\n\nThe aims, 3× in bf16 and 5× in int8, are missed by {', '.join(missed) or 'none'}. "
        f"Slower than the peer in PyTorch, fp32, at batch 1 or 8: {listed(slower) if slower else 'none'}."
        + f" Notes: {'; '.join(notes)}." * bool(notes)
        + (f" Not measured: {listed(unmeasured)}." if unmeasured else "")
        + load_before(found)
    )


def cold() -> str:
    """From the start of a command to its first answer."""
    found = load("cold")
    heading = ["command", "seconds (fastest to slowest)", "processor seconds", "memory"]
    rows = [
        [
            f"`{one['command']}`",
            f"{one['seconds']:.2f} ({one['fastest']:.2f} to {one['slowest']:.2f})",
            f"{one['processor_seconds']:.2f}",
            f"{one['mb']:.0f} MB",
        ]
        for one in found["rows"]
    ]
    missed = [
        f"`{one['command']}` misses its aim of {aim:g} s"
        for one in found["rows"]
        if one["seconds"] > (aim := 3.0 if one["command"].startswith("tokenfusion ") else 0.8)
    ]
    light = [one for one in found["rows"] if not one["command"].startswith("tokenfusion ")]
    heavy = [f"`{one['command']}` ({one['mb']:.0f} MB)" for one in light if one["mb"] >= 200]
    memory = f"is missed by {listed(heavy)}" if heavy else f"is kept: {max(one['mb'] for one in light):.0f} MB at most"
    return (
        f"From the start of a command to its end, an image of a run of `{found['model']}`, medians of "
        f"{found['turns']} on {found['hardware']}; what other work held up is in the seconds, and not in those of the "
        f"processors:\n\n{table(heading, rows)}\n\n"
        f"{'; '.join(missed) or 'The aims, 3 s and 0.8 s, are reached'}. The aim of "
        f"less than 200 MB without torch {memory}.{load_before(found)}"
    )
