"""The description inside the graph's own file: behind what the gate judged, of which no byte changes."""

import json
import zipfile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from tokenfusion_runtime.engines import INSIDE


def write_inside(graph: Path, description: dict[str, Any]) -> None:
    """Put a description into a graph's file: metadata of ONNX, `rt_info` of OpenVINO, an extra file of pt2."""
    text = json.dumps(description)  # in ASCII, which any format keeps
    {"onnx": append_metadata, "openvino": insert_rt_info, "pt2": append_file}[description["format"]](graph, text)


def append_metadata(graph: Path, text: str) -> None:
    """Messages of protobuf, one behind another, are one message."""
    import onnx

    entry = onnx.StringStringEntryProto(key=INSIDE, value=text)
    with graph.open("ab") as file:
        file.write(onnx.ModelProto(metadata_props=[entry]).SerializeToString())


def insert_rt_info(graph: Path, text: str) -> None:
    """Into the XML; the weights beside it are not touched."""
    before, end, after = graph.read_text(encoding="utf-8").rpartition("</rt_info>")
    graph.write_text(f"{before}\t<{INSIDE} value={quoteattr(text)} />\n\t{end}{after}", encoding="utf-8")


def append_file(graph: Path, text: str) -> None:
    """Into the archive, which is a zip file with one folder."""
    with zipfile.ZipFile(graph, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/extra/{INSIDE}.json", text)
