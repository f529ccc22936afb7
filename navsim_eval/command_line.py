"""The edge between a shell and a function: parse overrides, print help that teaches, report errors in one line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from navsim_eval.config import CONFIG_ROOT, DEFAULT_ROOT, DataConfig, describe, groups_in_defaults, load_config
from navsim_eval.errors import UserError

# Tools that make the city themselves, only look around, or read data only on request.
WITHOUT_DATA = ("make_city", "demo", "doctor", "compare", "submit", "data")


def run_tool(
    main: Callable[[Any], Any],
    schema: type,
    config: str,
    doc: str,
    argv: Sequence[str] | None = None,
    positional: Sequence[str] = (),
) -> int:
    """Run `main(config)` with a configuration composed from `configs/<config>.yaml` and the command line.

    positional: keys that arguments without "=" stand for, in order (`compare.py A B` is `compare.py a=A b=B`)

    `--help` explains the tool and lists its keys; `--config` prints the resolved configuration instead of running.

    Returns the exit status: 0 on success, 2 on a UserError (one line on standard error), 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(a in ("-h", "--help") for a in arguments):
        _show(help_text(schema, config, doc))
        return 0
    show = "--config" in arguments
    arguments = _named([a for a in arguments if a != "--config"], positional)
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        settings = load_config(schema, config, arguments)
        if show:
            print(OmegaConf.to_yaml(OmegaConf.structured(settings)), end="")
        else:
            make_default_city(config, settings)
            main(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; the same command resumes", file=sys.stderr)
        return 130
    return 0


def _show(text: str) -> None:
    """Print, and do not mind a reader that has had enough (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit does not complain either


def _named(arguments: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Arguments with the names that their places stand for; values are quoted, as paths may hold Hydra's characters."""
    left = iter(keys)
    named = []
    for argument in arguments:
        key = None if "=" in argument or argument[:1] in "~+-" else next(left, None)
        text = argument.replace("\\", "\\\\").replace("'", "\\'")
        named.append(argument if key is None else f"{key}='{text}'")
    return named


def make_default_city(tool: str, settings: Any) -> None:
    """The synthetic city is the data of whoever has none: made when a tool first wants to read it."""
    data = getattr(settings, "data", None)
    if tool in WITHOUT_DATA or not isinstance(data, DataConfig) or data.root != DEFAULT_ROOT:
        return
    if (Path(data.root) / "navsim_logs").exists():
        return
    from navsim_eval.city.make import CityConfig, make_city

    print(f"no data named: making the synthetic city in {data.root} first (see tools/make_city.py)", file=sys.stderr)
    bars: dict[str, tqdm] = {}

    def show(stage: str, finished: int, total: int) -> None:
        bar = bars.setdefault(stage, tqdm(total=total, desc=stage))
        bar.total = total
        bar.update(finished)

    try:
        make_city(CityConfig(), data.root, data.maps, progress=show)
    finally:
        for bar in bars.values():
            bar.close()


def help_text(schema: type, config: str, doc: str) -> str:
    """The tool's own words, then every key with its type and default, then the options of each group."""
    lines = [doc.strip(), "", "Keys (key=value; defaults shown):"]
    rows = describe(schema)
    width = max(len(key) for key, _, _ in rows)
    lines += [f"  {key:<{width}}  {kind:<14} {default}".rstrip() for key, kind, default in rows]
    names = {key.split(".")[0] for key, _, _ in rows} | groups_in_defaults(CONFIG_ROOT / f"{config}.yaml")
    groups = [path for path in sorted(CONFIG_ROOT.iterdir()) if path.is_dir() and path.name in names]
    if groups:
        lines += ["", "Groups (group=option):"]
        for group in groups:
            lines.append(f"  {group.name}: {', '.join(sorted(p.stem for p in group.glob('*.yaml')))}")
    lines += ["", f"Defaults are in configs/{config}.yaml; --config prints the resolved configuration and stops."]
    return "\n".join(lines)
