import pytest

from metatt_scale.evaluation.tasks import load_definition


@pytest.mark.parametrize("task", ["../evil", "/tmp/evil", "a/b", "", "..", "evil.yaml/.."])
def test_a_task_file_is_never_taken_from_a_path(tmp_path, task):
    """Task files are code of the harness's kind: only names in known folders are looked up."""
    with pytest.raises(ValueError, match="not a task name"):
        load_definition(task, tmp_path)
