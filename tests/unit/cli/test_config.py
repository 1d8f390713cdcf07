import subprocess
import sys

import pytest

import agentray


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agentray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


def test_a_good_file_is_ok_and_summed_up_without_secrets(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text("postgres: {url: '${PG}'}\nhttp: {port: 8123}\n")
    done = run("config", "check", str(path), PG="postgresql://u:s3cret@db/x")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{path}: ok\n")
    assert "127.0.0.1:8123" in done.stdout
    assert "s3cret" not in done.stdout


def test_a_bad_file_exits_1_with_a_line_for_each_problem_and_no_traceback(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("http: {prot: 1}\nlog: {level: loud}\n")
    done = run("config", "check", str(path))
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"agentray: {path}: http.prot: unknown key; did you mean port?")


def test_a_schema_that_answers_cannot_follow_is_a_problem_of_the_file(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("agents: {a: {output_schema: {type: thing}}}\n")
    done = run("config", "check", str(path))
    assert done.returncode == 1
    assert f"{path}: agents.a.output_schema: is no valid JSON schema: 'thing'" in done.stderr


def test_the_version_is_the_packages():
    assert run("--version").stdout == f"agentray {agentray.__version__}\n"


@pytest.mark.parametrize("what", ["import agentray", "import agentray.cli"])
def test_importing_it_brings_neither_ray_nor_a_store(what):
    code = f"{what}\nimport sys\nprint(sorted({{'ray', 'psycopg', 'redis'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"
