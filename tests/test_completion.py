import shutil
import subprocess

import pytest

from fused_rlhf.trainers import cli


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_knows_commands_and_flags(capsys, shell):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in cli.COMMANDS)
    assert all(flag in script for flag in ("--learning-rate", "--loss-type", "--config", "--dry-run"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_a_flag(capsys, tmp_path):
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "complete.sh"
    script.write_text(capsys.readouterr().out)
    ask = f"""
source {script}
function=$(complete -p fused-rlhf | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=(fused-rlhf grpo --learning-r) COMP_CWORD=2
$function fused-rlhf --learning-r grpo
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert "--learning-rate" in done.stdout.split(), done.stderr


def test_another_shell_is_refused(capsys):
    assert cli.main(["completion", "fish"]) == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err
