"""docker/ and its how-to page without a Docker engine: schema, lint, and every command against the program itself.

docker_compose_spec.json is the Compose Specification's schema (Apache-2.0; docker_README.md says where it is from).
"""

import fnmatch
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import typer
import yaml
from packaging.requirements import Requirement

import cli
from harvest.serve.rest import files
from shared.command import options
from shared.request import StoreRequest
from shared.service.asking import parse_request

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/how-to/docker.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SCRIPTS = Path(sys.executable).parent
HADOLINT = shutil.which("hadolint", path=str(SCRIPTS)) or shutil.which("hadolint")
SERVICES = ("serve", "worker", "harvest", "train", "eval", "report")
"""The services that run sagsae. nginx has an image of its own."""


# ---- the Dockerfile


class Instruction(NamedTuple):
    word: str
    arguments: str
    stage: int


def instructions(dockerfile: str) -> list[Instruction]:
    """Logical lines: comments and empty lines dropped, also inside an instruction; continuations joined."""
    found: list[Instruction] = []
    pending = ""
    for line in dockerfile.splitlines():
        if line.lstrip().startswith("#") or not line.strip():
            continue
        pending += line.rstrip().removesuffix("\\")
        if line.rstrip().endswith("\\"):
            continue
        word, _, arguments = pending.strip().partition(" ")
        stage = (found[-1].stage if found else -1) + (word.upper() == "FROM")
        found.append(Instruction(word.upper(), arguments.strip(), stage))
        pending = ""
    assert not pending, "the last line goes on nowhere"
    return found


def shell_of(run: Instruction) -> str:
    return re.sub(r"^(--\w+=\S+\s+)+", "", run.arguments)


def only(found: list[Instruction], word: str) -> list[str]:
    return [each.arguments for each in found if each.word == word]


def problems(dockerfile: str) -> set[str]:
    """The names of the rules that are broken."""
    found = instructions(dockerfile)
    last = [each for each in found if each.stage == found[-1].stage]
    return {
        name
        for name, broken in {
            "base": broken_base(only(found, "FROM")),
            "add": only(found, "ADD"),
            "heredoc": [each for each in found if "<<" in each.arguments],
            "apt": [run for run in only(found, "RUN") if "apt" in run and not clean_apt(run)],
            "pip": [run for run in only(found, "RUN") if "pip install" in run and not cached(run)],
            "sudo": re.findall(r"\bsudo\b", " ".join(only(found, "RUN"))),
            "secret": [
                s for w in ("ARG", "ENV") for s in only(found, w) if re.search("TOKEN|SECRET|PASSW|API_?KEY", s)
            ],
            "user": broken_user(last),
            "entrypoint": [last[-1]] if not exec_form(last) else [],
            "layers": broken_layers(last),
        }.items()
        if broken
    }


def broken_base(origins: list[str]) -> list[str]:
    stages = [origin.split()[-1] for origin in origins if " AS " in origin]
    outside = [origin.split()[0] for origin in origins if origin.split()[0] not in stages]
    return [image for image in outside if not re.fullmatch(r"[\w./-]+:[\w.-]*\d+\.\d+[\w.-]*(@sha256:\w{64})?", image)]


def clean_apt(run: str) -> bool:
    installs = re.findall(r"apt-get install([^&;]*)", run)
    options = all("--no-install-recommends" in i and re.search(r"(^|\s)(--yes|-y)\s", i) for i in installs)
    return bool(installs) and options and "apt-get update" in run and "rm -rf /var/lib/apt/lists/*" in run


def cached(run: str) -> bool:
    return "--no-cache-dir" in run or "--mount=type=cache,target=/root/.cache/pip" in run


def broken_user(last: list[Instruction]) -> list[str]:
    defaults = dict(argument.split("=", 1) for argument in only(last, "ARG") if "=" in argument)
    words = [each.word for each in last]
    users = [re.sub(r"\$\{?(\w+)\}?", lambda m: defaults.get(m[1], "0"), user) for user in only(last, "USER")]
    if not users or "ENTRYPOINT" not in words or words.index("USER") > words.index("ENTRYPOINT"):
        return ["not set before ENTRYPOINT"]
    return [user for user in users if user.partition(":")[0] in ("root", "0")]


def exec_form(last: list[Instruction]) -> bool:
    try:
        return all(isinstance(json.loads(each), list) for w in ("ENTRYPOINT", "CMD") for each in only(last, w))
    except json.JSONDecodeError:
        return False


def broken_layers(last: list[Instruction]) -> list[str]:
    """Code is copied only after the dependencies are installed, and the dependencies come from another stage."""
    code = [n for n, each in enumerate(last) if each.word == "COPY" and "--from=" not in each.arguments]
    dependencies = [n for n, each in enumerate(last) if each.word == "RUN" and "--requirement" in each.arguments]
    return [] if code and dependencies and dependencies[0] < code[0] else ["code before dependencies"]


def test_dockerfile_keeps_every_rule() -> None:
    assert problems(DOCKERFILE) == set()


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        ("base", ":13.0.2-base-ubuntu24.04", ":latest"),
        ("base", ":13.0.2-base-ubuntu24.04", ""),
        ("add", "COPY train train", "ADD https://example.org/train.tar train"),
        ("heredoc", "python3 -m venv /opt/venv", "cat <<EOF"),
        ("apt", "--no-install-recommends ", ""),
        ("apt", "--yes ", ""),
        ("apt", "    && rm -rf /var/lib/apt/lists/*\n", "    && true\n"),
        ("pip", "RUN --mount=type=cache,target=/root/.cache/pip \\\n    pip", "RUN pip"),
        ("sudo", "    && useradd", "    && sudo useradd"),
        ("secret", "ARG USER_ID=1000", "ARG USER_ID=1000\nARG HF_TOKEN"),
        ("user", "USER $USER_ID\n", ""),
        ("user", "USER $USER_ID", "USER root"),
        ("user", "ARG USER_ID=1000", "ARG USER_ID=0"),
        ("user", 'ENTRYPOINT ["sagsae"]\n', ""),
        ("entrypoint", 'ENTRYPOINT ["sagsae"]', "ENTRYPOINT sagsae"),
        ("layers", "COPY --from=requirements", "COPY . /code\nCOPY --from=requirements"),
        ("layers", "--requirement /opt/requirements.txt", "torch"),
    ],
)
def test_each_rule_notices(rule: str, old: str, new: str) -> None:
    assert DOCKERFILE.count(old) == 1
    assert problems(DOCKERFILE.replace(old, new)) == {rule}


def test_parser_joins_continuations_and_drops_comments_between_them() -> None:
    text = "# syntax\nFROM a:1.0 AS b\n\nRUN one \\\n  # why\n\n    && two\nFROM b\nrun three\n"
    found = [(each.word, each.arguments.split(), each.stage) for each in instructions(text)]
    runs = [("RUN", ["one", "&&", "two"], 0), ("FROM", ["b"], 1), ("RUN", ["three"], 1)]
    assert found == [("FROM", ["a:1.0", "AS", "b"], 0), *runs]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint() -> None:
    assert HADOLINT
    done = subprocess.run([HADOLINT, "--no-color", ROOT / "docker/Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("run", [each for each in instructions(DOCKERFILE) if each.word == "RUN"])
def test_every_run_is_shell(run: Instruction) -> None:
    done = subprocess.run(["sh", "-n"], input=shell_of(run), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_program_and_its_process() -> None:
    last = [each for each in instructions(DOCKERFILE) if each.stage == instructions(DOCKERFILE)[-1].stage]
    environment = dict(pair.split("=", 1) for line in only(last, "ENV") for pair in line.split())
    assert only(last, "ENTRYPOINT") == [json.dumps(list(PROJECT["project"]["scripts"]))]
    assert only(last, "STOPSIGNAL") == ["SIGTERM"]
    assert environment["PYTHONUNBUFFERED"] == "1"
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
    made = next(run for run in only(last, "RUN") if "install --directory" in run)
    for folder in [*json.loads(only(last, "VOLUME")[0]), environment["HF_HOME"]]:
        assert folder in made.split()


def test_dependencies_are_those_of_the_project(tmp_path: Path) -> None:
    found = instructions(DOCKERFILE)
    stage = next(each.stage for each in found if each.word == "FROM" and each.arguments.endswith(" AS requirements"))
    (run,) = (each for each in found if each.stage == stage and each.word == "RUN")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run(["sh", "-c", shell_of(run)], cwd=tmp_path, check=True, env={"PATH": f"{SCRIPTS}:/usr/bin:/bin"})
    lines = (tmp_path / "requirements.txt").read_text().splitlines()
    assert lines == PROJECT["project"]["dependencies"]
    assert "torch" in {Requirement(line).name for line in lines}


def copied() -> list[str]:
    """What the Dockerfile takes from the working tree."""
    sources = [each.split()[:-1] for each in only(instructions(DOCKERFILE), "COPY") if "--from=" not in each]
    return sorted({source for each in sources for source in each})


def let_in(path: str, ignore: str) -> bool:
    """Whether .dockerignore lets a path through: the last pattern that matches it or a folder above it decides."""
    inside = True
    parts = Path(path).parts
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for pattern in (line.strip() for line in ignore.splitlines()):
        if pattern and not pattern.startswith("#"):
            wanted = pattern.removeprefix("!").removeprefix("**/")
            names = [*above, *parts] if "**/" in pattern else above
            if any(fnmatch.fnmatchcase(name, wanted) and (wanted != "*" or "/" not in name) for name in names):
                inside = pattern.startswith("!")
    return inside


def test_what_is_copied_exists_and_is_let_in() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    assert [source for source in copied() if not (ROOT / source).exists()] == []
    assert [source for source in copied() if not let_in(source, ignore)] == []
    for outside in ("runs/a", "stores/b/c", ".venv/bin/python", "tests/x.py", ".git/config", ".env", "docker/.env"):
        assert not let_in(outside, ignore), outside
    assert let_in("shared/tiny/config.json", ignore)
    assert not let_in("shared/__pycache__/store.pyc", ignore)


def test_what_is_copied_builds_a_complete_wheel(tmp_path: Path) -> None:
    for needed in map(Requirement, PROJECT["build-system"]["requires"]):
        if not needed.specifier.contains(metadata.version(needed.name)):
            pytest.skip(f"{needed} is not installed, and nothing may be downloaded here")
    tree = tmp_path / "tree"
    tree.mkdir()
    for source in copied():
        place = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        place(ROOT / source, tree / source)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", *offline, "--wheel-dir", str(tmp_path), str(tree)]
    subprocess.run(build, check=True, env={"PATH": "/usr/bin:/bin"}, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    assert {"cli.py", "harvest/run.py", "train/run.py", "shared/tiny/model.safetensors", "train/py.typed"} <= inside
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "train/report").glob("*.[hcj]*s*")}
    assert templates <= inside


# ---- compose.yaml


def interpolated(text: str, given: Mapping[str, str]) -> str:
    """Compose's ${NAME}, ${NAME:-default} (which may hold others) and $$, and nothing else."""
    done = ""
    while text:
        before, dollar, text = text.partition("$")
        done += before
        if not dollar:
            break
        if text.startswith("$"):
            done, text = done + "$", text[1:]
            continue
        name = re.match(r"\{([A-Z][A-Z_0-9]*)(:-|\})", text)
        assert name, f"not understood: ${text}"
        text = text[name.end() :]
        default = ""
        if name[2] == ":-":
            end, depth = 0, 1
            while depth:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            default, text = text[: end - 1], text[end:]
        done += given.get(name[1]) or interpolated(default, given)
    return done


def filled_in(value: Any, given: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: filled_in(each, given) for key, each in value.items()}
    if isinstance(value, list):
        return [filled_in(each, given) for each in value]
    return interpolated(value, given) if isinstance(value, str) else value


def compose(**given: str) -> Any:
    return filled_in(COMPOSE, given)


def command(service: str, **given: str) -> list[str]:
    return shlex.split(compose(**given)["services"][service]["command"])


def variables() -> set[str]:
    given = [each.get("environment", {}) for each in COMPOSE["services"].values()]
    unset = {name for each in given for name, value in each.items() if value is None}
    return set(re.findall(r"\$\{(\w+)", json.dumps(COMPOSE))) | unset


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a ${A} b", "a 1 b"),
        ("${B:-two}", "two"),
        ("${EMPTY:-two}", "two"),
        ("${B:-${C:-${D:-four}}}/x", "four/x"),
        ("${B:-${A:-4}}${A}", "11"),
        ("$$HOME ${B:-}", "$HOME "),
    ],
)
def test_interpolation(text: str, expected: str) -> None:
    assert interpolated(text, {"A": "1", "EMPTY": ""}) == expected


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(
        json.loads((ROOT / "tests/docs/docker_compose_spec.json").read_text(encoding="utf-8"))
    )


@pytest.mark.parametrize("given", [{}, {"GPUS": "4", "STORES": "/big/stores"}])
def test_compose_follows_the_specification(schema: jsonschema.Draft7Validator, given: dict[str, str]) -> None:
    schema.validate(compose(**given))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("services", "train", "entrypont"), "sagsae"),
        (("services", "train", "depends_on", "serve", "condition"), "service_done"),
        (("services", "train", "deploy", "resources", "reservations", "devices", 0, "gpus"), 1),
        (("services", "train", "deploy", "resources", "reservations", "devices", 0, "capabilities"), "gpu"),
        (("services", "train", "init"), [True]),
        (("volume",), {}),
    ],
)
def test_the_specification_refuses(schema: jsonschema.Draft7Validator, place: tuple[Any, ...], value: Any) -> None:
    broken = inside = compose()
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        schema.validate(broken)


def test_compose_itself_makes_the_same_commands() -> None:
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("the Compose plugin is not installed")
    given = {"MODEL": "gpt2", "GPUS": "2", "TRAIN_ARGS": "--sparsity 0.1 --sparsity 0.2", "DATA": "/texts"}
    words = [docker, "compose", "-f", str(ROOT / "docker/compose.yaml")]
    words += ["--profile", "report", "config", "--format", "json"]
    home = {name: value for name, value in os.environ.items() if name not in variables()}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=home | given)
    said = json.loads(done.stdout)["services"]
    assert {name: each["command"] for name, each in said.items()} == {name: command(name, **given) for name in SERVICES}
    assert said["train"]["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 2
    assert Path(said["train"]["build"]["context"]) == ROOT
    assert {"type": "bind", "source": "/texts", "target": "/data", "read_only": True}.items() <= next(
        volume for volume in said["harvest"]["volumes"] if volume["target"] == "/data"
    ).items()


def test_services_resume_stop_and_keep_secrets_outside() -> None:
    services = compose()["services"]
    assert set(services) == {*SERVICES, "nginx"}
    for name in SERVICES:
        service = services[name]
        asks = name in ("worker", "train")
        assert service["init"] is True, name
        assert service["restart"] == ("unless-stopped" if name in ("serve", "worker") else "on-failure:3"), name
        assert service["stop_grace_period"] == "2m", name
        token = {"SAGSAE_TOKEN_FILE": "/run/secrets/token"} if asks else {}
        assert service["environment"] == {"HF_TOKEN": None, **token}, name
        assert service.get("secrets", []) == (["token"] if asks or name == "serve" else []), name
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file(), name
        assert ("profiles" in service) == (name in ("harvest", "eval", "report")), name
        sources = {volume.split(":")[0] for volume in service["volumes"]}
        assert sources == set(compose()["volumes"]), name
    for name in ("worker", "train", "nginx"):
        assert services[name]["depends_on"] == {"serve": {"condition": "service_healthy"}}
    for before, after in itertools.pairwise(("train", "eval", "report")):
        assert services[after]["depends_on"] == {before: {"condition": "service_completed_successfully"}}


def test_only_this_machine_reaches_the_cache_and_it_needs_a_token() -> None:
    services = compose()["services"]
    published = [port for each in services.values() for port in each.get("ports", [])]
    assert published == ["127.0.0.1:8642:8642", "127.0.0.1:8643:8643"]
    served = configured(command("serve"))
    assert (served.host, served.token_file, served.launch) == ("0.0.0.0", Path("/run/secrets/token"), "none")
    assert "readyz" in services["serve"]["healthcheck"]["test"][-1]


def test_nginx_sends_the_files_that_the_service_points_to() -> None:
    text = (ROOT / "docker/nginx.conf").read_text(encoding="utf-8")
    place, inside = re.findall(r"location (\S+) {\n\s+internal;.*\n\s+alias (\S+);", text)[0]
    assert place == files.ACCEL
    assert inside == f"{configured(command('serve')).root}/"
    (mount,) = [volume for volume in compose()["services"]["nginx"]["volumes"] if inside.strip("/") in volume]
    assert mount.endswith(":/stores:ro")


def test_mounts_are_the_folders_of_the_image() -> None:
    targets = {volume.split(":")[1] for volume in compose()["services"]["train"]["volumes"]}
    environment = " ".join(only(instructions(DOCKERFILE), "ENV"))
    home = re.search(r"HF_HOME=(\S+)", environment)
    (volumes,) = only(instructions(DOCKERFILE), "VOLUME")
    assert home
    assert targets == {*json.loads(volumes), home[1], "/data"}


# ---- the commands


class Resolved(Exception):
    def __init__(self, config: Any) -> None:
        self.config = config


def parsed(words: list[str]) -> dict[str, Any]:
    """A command's options by the program's own parser. Nothing is run."""
    found: Any = typer.main.get_command(cli.app)
    name, rest = "sagsae", list(words)
    while hasattr(found, "commands") and rest[0] != "--help":
        name, *rest = rest
        assert name in found.commands, f"sagsae has no command {name}"
        found = found.commands[name]
    if rest == ["--help"]:
        return {}
    context = found.make_context(name, rest)
    return dict(context.params)


def configured(words: list[str]) -> Any:
    """A command's validated configuration: the command runs up to there."""
    resolve = options.resolve

    def stop(*arguments: Any, **more: Any) -> None:
        raise Resolved(resolve(*arguments, **more))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGSAE_SERVICE", "")  # --service sets it for the process
        patch.setattr(cli, "resolve", stop)
        patch.setattr(cli, "answer_settings", lambda context: {"store": "answered"} if context else {})
        with pytest.raises(Resolved) as stopped:
            cli.app(words, standalone_mode=False)
    return stopped.value.config


def check_command(words: list[str]) -> None:
    parsed(words)
    if words[0] in ("harvest", "train", "eval", "serve", "work"):
        configured(words)


@pytest.mark.parametrize("service", SERVICES)
def test_default_commands_are_accepted(service: str) -> None:
    check_command(command(service))


def test_services_hand_over_to_each_other() -> None:
    given = {"MODEL": "tiny", "CORPUS": "data", "CORPUS_CONFIG": "null", "TOKENS": "2000", "D_SAE": "64"}
    serve, train = configured(command("serve", **given)), configured(command("train", **given))
    assert serve.allow_corpus == ("data=/data",)
    assert configured(command("worker", **given)).root == serve.root
    asked = asked_by(train)
    assert (asked.model, asked.corpus, asked.corpus_config, asked.tokens) == ("tiny", "data", None, 2000)
    assert (asked.layers, asked.hooks) == (("mid",), ("mlp_out",))
    assert train.follow
    assert {(sae.arch, sae.d_sae) for sae in train.saes} == {("sa-gsae", 64)}
    assert configured(command("eval", **given)).run == train.out
    report = configured(command("report", **given))
    assert (report.runs, report.out) == ((train.out,), train.out.with_suffix(".html"))
    alone = configured(command("harvest", **given))
    assert (alone.out, alone.name, alone.tokens) == (str(serve.root), "tiny", 2000)


def asked_by(train: Any) -> StoreRequest:
    return parse_request(train.request)


def test_variables_reach_the_commands() -> None:
    arguments = {"HARVEST_ARGS": "--codec lz4", "TRAIN_ARGS": "--sparsity 0.1 --sparsity 0.3 --seed 7"}
    arguments |= {"SERVE_ARGS": "--quota 2TB", "SERVICE": "http://cache:1", "DTYPE": "float32"}
    given = {"GPUS": "4", "MODEL": "EleutherAI/pythia-70m", "STORE": "small", "RUN": "one", **arguments}
    harvest, train = configured(command("harvest", **given)), configured(command("train", **given))
    serve, worker = configured(command("serve", **given)), configured(command("worker", **given))
    assert (harvest.model, harvest.name, harvest.codec) == ("EleutherAI/pythia-70m", "small", "lz4")
    assert asked_by(train).model == "EleutherAI/pythia-70m"
    assert train.out == Path("/runs/one")
    assert (serve.quota, serve.dtype) == (2 * 10**12, "float32")
    assert (worker.service, worker.processes) == ("http://cache:1", 4)
    assert [(sae.sparsity, sae.seed) for sae in train.saes] == [(0.1, 7), (0.3, 7)]
    (device,) = compose(**given)["services"]["train"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "4", "capabilities": ["gpu"]}
    assert parsed(command("train", **given))["processes"] == 4


# ---- docs/how-to/docker.md

TAKES_A_VALUE = {
    "-v",
    "--volume",
    "-e",
    "--env",
    "--network",
    "--gpus",
    "--shm-size",
    "--name",
    "-t",
    "-f",
    "--profile",
}


def shell_lines() -> Iterator[str]:
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL):
        yield from filter(None, block.replace("\\\n", " ").splitlines())


def split_off_options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    options: dict[str, str] = {}
    while words and words[0].startswith("-"):
        name, *words = words
        options[name] = words.pop(0) if name in TAKES_A_VALUE else ""
    return options, words


@pytest.mark.parametrize("line", list(shell_lines()))
def test_every_command_of_the_page(line: str) -> None:
    if line.startswith("(umask"):
        return
    words = shlex.split(line)
    given = {}
    while match := re.fullmatch(r"([A-Z_]+)=(.*)", words[0]):
        given[match[1]] = match[2]
        words = words[1:]
    assert set(given) <= variables(), "compose.yaml knows no such variable"
    tool, *words = words
    if tool == "mkdir":
        return
    assert tool == "docker"
    verb, *words = words
    options, words = split_off_options(words)
    if verb == "build":
        assert (ROOT / options["-f"]).is_file()
        assert (options["-t"], words) == (COMPOSE["x-sagsae"]["image"], ["."])
    elif verb == "run":
        image, *words = words
        assert image == COMPOSE["x-sagsae"]["image"]
        check_command(words)
    else:
        assert verb == "compose"
        assert (ROOT / options["-f"]).is_file()
        check_compose(words, given)


def check_compose(words: list[str], given: dict[str, str]) -> None:
    verb, *words = words
    _, words = split_off_options(words)
    if verb == "run":
        service, *own = words
        check_command(own or command(service, **given))
    elif verb == "up":
        for service in SERVICES:
            check_command(command(service, **given))
    elif verb == "cp":
        assert words[0].split(":")[0] in SERVICES
        assert words[0].split(":")[1] == f"{parsed(command('report'))['out']}"
    else:
        assert verb == "logs"


def test_page_and_compose_name_the_same_variables() -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", PAGE, re.MULTILINE)
    documented = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(documented) == variables()
    text = json.dumps(COMPOSE)
    for name, default in documented.items():
        if default.startswith("`"):
            assert set(re.findall(rf"\$\{{{name}:-([^}}]*)\}}", text)) == {default.strip("`")}, name


@pytest.mark.parametrize(
    ("service", "name"), [("harvest", "HARVEST_ARGS"), ("train", "TRAIN_ARGS"), ("serve", "SERVE_ARGS")]
)
def test_example_arguments_of_the_page(service: str, name: str) -> None:
    example = re.search(rf"^\| `{name}` .*?`(--[^`]+)`", PAGE, re.MULTILINE)
    assert example
    check_command(command(service, **{name: example[1]}))
