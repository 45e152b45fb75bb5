"""The error tree: one line each, stable codes, and the way through a job's exit code and back."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from kaito_flows import errors
from kaito_flows.errors import DatasetError, DiskFullError, Fault, InputError, JobError, KaitoFlowsError, WorkspaceError


def classes(root: type[KaitoFlowsError] = KaitoFlowsError) -> Iterator[type[KaitoFlowsError]]:
    yield root
    for child in root.__subclasses__():
        yield from classes(child)


def test_an_error_is_one_line_with_code_place_message_and_hint() -> None:
    error = DatasetError("no\nsuch   file", place="https://a/b", hint="check\nit", code="dataset-not-found")
    assert str(error) == "dataset-not-found: https://a/b: no such file (check it)"


def test_every_class_is_drawn_in_the_docstring_and_exported() -> None:
    for cls in classes():
        if cls.__module__ == errors.__name__:
            assert cls.__name__ in (errors.__doc__ or "")
            assert cls.__name__ in errors.__all__


@pytest.mark.parametrize("cls", [c for c in classes() if c.job_exit_code > 2 and c is not WorkspaceError])
def test_a_job_exit_code_leads_back_to_its_class(cls: type[KaitoFlowsError]) -> None:
    raised = errors.from_job_exit(cls.job_exit_code, "m", code="c", place="p", hint="h")
    assert type(raised) is cls
    assert raised.as_dict() == {"code": "c", "place": "p", "message": "m", "hint": "h"}


def test_what_the_user_wrote_exits_with_2_and_what_failed_with_1() -> None:
    for cls in classes():
        assert cls.exit_code == (2 if issubclass(cls, InputError) else 1)
    assert type(errors.from_job_exit(99, "m")) is JobError


def test_errors_travel_between_processes() -> None:
    faults = WorkspaceError([Fault("a.b", "is wrong", "mend it"), Fault("c", "too")], source="w.yaml")
    for error in (DatasetError("m", place="p", hint="h", code="c"), faults):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.as_dict()) == (type(error), str(error), error.as_dict())
    assert str(faults) == "invalid-workspace: w.yaml: a.b: is wrong; and 1 more (mend it)"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_other_faults_pass_through(number: int) -> None:
    with pytest.raises(DiskFullError, match="disk-full: /x"), errors.disk_errors(Path("/x")):
        raise OSError(number, "full")
    with pytest.raises(PermissionError), errors.disk_errors(Path("/x")):
        raise PermissionError(errno.EACCES, "no")
