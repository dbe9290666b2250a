import json
import platform

import torch

from fxopt.timing import fingerprint, machine


def test_says_what_a_number_depends_on():
    facts = fingerprint()
    assert set(facts) == {
        *("cpu", "cores", "threads", "isa", "gpu", "load", "os", "python", "torch", "transformers")
    }
    assert facts["torch"] == torch.__version__
    assert facts["python"] == platform.python_version()
    assert isinstance(facts["cores"], int)
    assert facts["cores"] >= 1
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cpu"]
    assert facts["isa"]
    assert (facts["gpu"] is None) == (not torch.cuda.is_available())
    assert json.loads(json.dumps(facts)) == facts


def test_without_proc_it_still_names_the_processor(monkeypatch):
    monkeypatch.setattr(machine, "_cpu_field", lambda name: "")
    facts = fingerprint()
    assert facts["cpu"]
    assert facts["isa"] == torch.backends.cpu.get_cpu_capability()
