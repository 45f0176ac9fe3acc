"""The engine where it takes real processes, disks and servers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_packing import IMAGE, lines, made, write_items

from test_engine import CONTENTS, files, fill, rows, run
from toys.hazard import Hazard
from zoo.errors import OutputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent

COMMAND = """
import sys
sys.path.insert(0, sys.argv[1])
from toys.hazard import Hazard
from zoo import engine
options = {"workers": 2, "unit_items": 2, "encode": {"delay": 0.02}}
engine.tokenize(Hazard(), sys.argv[2], sys.argv[3], on_event=lambda event: print(event, flush=True), **options)
"""


def children(process: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(status[1]) == process and status[0] != "Z":
                found.append(int(entry.name))
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def parts_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.parquet"))}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_twenty_kills(tmp_path: Path) -> None:
    """Of the run or of one of its workers, whenever; in the end the bytes are those of an undisturbed run."""
    chance = random.Random(7)
    contents = [b"bad" if i % 25 == 7 else bytes([i]) * (1 + i % 9) for i in range(240)]
    folder, out = fill(tmp_path / "in", contents), tmp_path / "out"
    arguments = [sys.executable, "-c", COMMAND, str(TESTS), str(folder), str(out)]
    for kill in range(20):
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            if kill % 5 == 4:
                time.sleep(chance.uniform(0, 3))
            else:
                for _ in range(chance.randrange(1, 5)):
                    process.stdout.readline()
                time.sleep(chance.uniform(0, 0.1))
            workers = children(process.pid)
            if workers and kill % 2:
                os.kill(chance.choice(workers), signal.SIGKILL)
                process.stdout.readline()
                workers = children(process.pid)
            process.kill()
        end = time.monotonic() + 30
        while any(map(alive, workers)):
            assert time.monotonic() < end, "a worker outlived its run"
            time.sleep(0.1)
    done = len(list(out.glob("part-*")))
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*arguments[:-1], str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    assert 0 < done <= 120
    assert parts_of(out) == parts_of(tmp_path / "whole")
    wanted = {f"{i:02d}.bin": None if content == b"bad" else list(content) for i, content in enumerate(contents)}
    assert {row["key"]: row["ids"] for row in rows(out)} == wanted


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c(tmp_path: Path, times: int) -> None:
    """Once, the units in flight are finished; twice, it stops at once. No worker stays, and no lock."""
    folder, out = fill(tmp_path / "in", [b"%d" % i for i in range(60)]), tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(TESTS), str(folder), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        workers = children(process.pid)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        reported = 1 + len(process.stdout.readlines())
        assert process.wait() == -signal.SIGINT
    assert not any(map(alive, workers))
    assert not (out / "_plan" / "lock").exists()
    done = parts_of(out)
    assert reported <= len(done) < 30
    assert times > 1 or reported == len(done)
    run(folder, out, encode={"delay": 0.02})
    run(folder, tmp_path / "whole", encode={"delay": 0.02})
    assert parts_of(out) == parts_of(tmp_path / "whole")


PACKING = """
import sys
sys.path.insert(0, sys.argv[1])
from test_packing import pack
pack(sys.argv[3:5], sys.argv[5], form=sys.argv[2], unit_rows=2, on_event=lambda event: print(event["unit"], flush=True))
"""


@pytest.mark.parametrize("form", ["parquet", "megatron"])
def test_kills_of_packing(tmp_path: Path, form: str) -> None:
    """Whenever; in the end the bytes are those of an undisturbed call."""
    chance = random.Random(11)
    write_items(tmp_path / "items", IMAGE, {str(number): ids for number, ids in enumerate(made(1500, 300))})
    lines(tmp_path / "text.jsonl", [{"text": "word " * chance.randrange(20)} for _ in range(1500)])
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", PACKING, str(TESTS), form, str(tmp_path / "items"), str(tmp_path / "text.jsonl")]
    units = []
    for kill in range(12):
        with subprocess.Popen([*arguments, str(out)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            if kill % 6 == 5:
                time.sleep(chance.uniform(0, 3))
            else:
                for _ in range(chance.randrange(1, 8)):
                    process.stdout.readline()
                time.sleep(chance.uniform(0, 0.03))
            process.kill()
            assert process.wait() == -signal.SIGKILL
        units.append(len(list((out / "_plan").glob("unit-*.json"))))
    assert units == sorted(units) and len(set(units)) > 5
    subprocess.run([*arguments, str(out)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*arguments, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    assert units[-1] < len(list((out / "_plan").glob("unit-*.json")))
    assert files(out) == files(tmp_path / "whole")


OBJECTS = """
import io, os, sys, tarfile
sys.path.insert(0, sys.argv[1])
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(port=0, verbose=False)
server.start()
os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*server.get_host_and_port())
os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
import pyarrow.parquet as pq
import s3fs
from toys.hazard import Hazard
from zoo import engine
from zoo.engine import report
from zoo.engine.store import Store
bucket = s3fs.S3FileSystem(skip_instance_cache=True)
bucket.mkdir("bucket")
contents = [b"one", b"bad", b"three", b"four", b"five"]
whole = io.BytesIO()
with tarfile.open(fileobj=whole, mode="w") as tar:
    for index, content in enumerate(contents):
        bucket.pipe_file(f"bucket/in/deep/{index}.bin", content)
        member = tarfile.TarInfo(f"{index}.bin")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
bucket.pipe_file("bucket/in.tar", whole.getvalue())
for number, source in enumerate(["s3://bucket/in", "s3://bucket/in/*/*.bin", "s3://bucket/in.tar"]):
    out = f"s3://bucket/out{number}"
    run = lambda **options: engine.tokenize(Hazard(), source, out, workers=0, **options)
    summary = run(unit_items=2)
    assert (summary.items, summary.failures, summary.units) == (5, 1, 3), summary
    assert run().encoded == 0
    before = bucket.cat_file(f"{out}/part-000001.parquet")
    bucket.rm(f"{out}/part-000001.parquet")
    assert run().encoded == 2
    assert bucket.cat_file(f"{out}/part-000001.parquet") == before
    parts = [pq.read_table(io.BytesIO(bucket.cat_file(f"{out}/part-00000{unit}.parquet"))) for unit in range(3)]
    ids = [ids for part in parts for ids in part["ids"].to_pylist()]
    assert ids == [None if content == b"bad" else list(content) for content in contents], ids
    assert list(report.problems(Store(out), report.plan_in(Store(out)))) == []
print("done", flush=True)
os._exit(0)
"""


def test_an_object_store(tmp_path: Path) -> None:
    """Sources and output on an S3 server of the loopback; the same command goes on where a part is missing."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    result = subprocess.run([sys.executable, "-c", OBJECTS, str(TESTS)], capture_output=True, text=True)
    assert result.stdout == "done\n", result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_disk_that_runs_full(tmp_path: Path) -> None:
    """A small one of its own; with more room the same command goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        noise = random.Random(0)
        folder = fill(tmp_path / "in", [noise.randbytes(20_000) for _ in range(12)])
        with pytest.raises(OutputError, match="no room"):
            run(folder, disk / "out", unit_items=1)
        assert 0 < len(parts_of(disk / "out")) < 12
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        run(folder, disk / "out", unit_items=1)
        run(folder, tmp_path / "whole", unit_items=1)
        assert parts_of(disk / "out") == parts_of(tmp_path / "whole")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from toys.hazard import Hazard
from zoo.engine import parts, plan
from zoo.engine.sources import Choice, Listing, Row
from zoo.engine.store import Store
class Many(Listing):
    def __iter__(self):
        for i in range(1_000_000):
            name = f"folder{i // 1000:04d}/recording-{i:07d}.wav"
            yield Row(name, "file", f"/data/{name}", size=160_000, bytes=160_000, stamp=str(i * 7919))
header = parts.Header.of_spec(Hazard().spec, {}, True)
store = Store(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = plan.create(store, plan.Plan(header, {}, ("/data",), (), 512, 10**9), Many(["/data"], Choice("bytes", None)))
units = [unit for unit, rows in made.rows(store, lambda unit: unit % 2 == 0)]
plan.extend(store, made, ("/data",), Many(["/data"], Choice("bytes", None)))
assert (made.items, made.units, len(units)) == (1_000_000, 1954, 977)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_the_listing_of_a_million_items_takes_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(TESTS), str(tmp_path / "out")]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(result.stdout) < 200


def test_an_hour_among_clips_takes_little_memory(tmp_path: Path) -> None:
    """One recording of an hour among clips of a second: model, and less than 2 GiB."""
    soundfile = pytest.importorskip("soundfile")
    import numpy as np

    noise = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for index in range(20):
        soundfile.write(tmp_path / "in" / f"{index:02d}.wav", noise.normal(0, 0.1, 16_000).astype("float32"), 16_000)
    with soundfile.SoundFile(tmp_path / "in" / "10-long.wav", "w", 16_000, 1) as long:
        for _ in range(3600):
            long.write(noise.normal(0, 0.1, 16_000).astype("float32"))
    code = (
        "import resource, sys, zoo; tok = zoo.load('wavtokenizer-tiny'); tok.encode(sys.argv[1] + '/00.wav')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(zoo.engine.tokenize(tok, sys.argv[1], sys.argv[2], workers=0).ids)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / "out")]
    ids, megabytes = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert ids == 3620 * 75
    assert megabytes < 2048


def test_the_command_line(tmp_path: Path) -> None:
    """Exit codes: failures, failures that are allowed, wrong usage."""
    folder = fill(tmp_path / "in", [*CONTENTS, b"x" * 200])
    assert Hazard().name == "hazard"

    def zoo(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "zoo", *map(str, arguments)], capture_output=True, text=True)

    (tmp_path / "gone.jsonl").write_text('{"path": "in/00.bin"}\n{"path": "in/none.bin"}\n')
    command = ["tokenize", "byteformer-tiny", tmp_path / "gone.jsonl", "-o", tmp_path / "out"]
    first = zoo(*command, "--workers", 1, "--json")
    assert first.returncode == 1, first.stderr
    assert '"failures": 1' in first.stdout
    assert zoo(*command, "--allow-failures", 0.5).returncode == 0
    other = zoo(*command, "--column", "path")
    assert (other.returncode, "column was None" in other.stderr) == (2, True)
    assert zoo("tokens", tmp_path / "out", "--verify", "--recompute", 2).returncode == 0
    assert zoo("tokens", folder).returncode == 1
