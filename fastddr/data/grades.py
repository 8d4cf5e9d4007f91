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
#: Photographs of each grade 0-5 in the splits of DDR (Li et al., Information Sciences 2019, table 2).
DDR = {
    "train": (3133, 315, 2238, 118, 456, 575),
    "valid": (1253, 126, 895, 47, 182, 230),
    "test": (1880, 189, 1344, 71, 275, 346),
}
