"""The grades of DDR: the international clinical diabetic retinopathy scale (ICDR), and two values beside it."""

from __future__ import annotations

#: ICDR names, indexed by grade 0-4.
ICDR = ("No DR", "Mild NPDR", "Moderate NPDR", "Severe NPDR", "Proliferative DR")
#: DDR's sixth label: the photograph cannot be graded. Counted and shown, never trained on.
UNGRADABLE = 5
#: A photograph without a label.
UNKNOWN = -1
#: Grades from here on are referred to an ophthalmologist ("referable DR": moderate NPDR or worse).
REFERABLE = 2
