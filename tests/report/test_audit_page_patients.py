"""What the audit page says of patients where no example names one."""

import dataclasses

import pytest
from phantoms import phantom

from medrl.evaluation.audit import audit
from medrl.report.audit_page import write_audit_page
from medrl.types import Example


@pytest.mark.parametrize(("patient", "shown"), [(None, True), ("p1", False)])
def test_unknown_patients_are_no_reassuring_zero(tmp_path, patient, shown):
    rows = []
    for number in range(4):
        image = tmp_path / f"{number}.png"
        phantom(number, side=64).save(image)
        row = Example(id=str(number), source="s", images=(image,), question="?", options=("a", "b"), target="A")
        rows.append(dataclasses.replace(row, patient=f"{patient}{number}" if patient else None))
    page = write_audit_page(audit(rows[:2], rows[2:]), tmp_path / "a.html").read_text()
    assert ("no test example names its patient" in page) is shown
