"""What a compile run records, as types that are written as JSON and read back."""

from .details import (
    CandidateScore,
    DataCard,
    Details,
    HeldOutLoss,
    LossLine,
    OtherDetails,
    PromptDetails,
    PromptState,
    RaceResult,
    SampleRow,
    TraceCounts,
    TrainedAdapter,
    WeightDetails,
)
from .record import ARROW, CELLS, STUDENT, Failure, Ledger, SavedRecord, StepRecord, StepStatus, failure_text
from .saved import SCHEMA, SHOWN, Saved, Whole, read
from .schema_1 import report_of_schema_1

__all__ = [
    "ARROW",
    "CELLS",
    "SCHEMA",
    "SHOWN",
    "STUDENT",
    "CandidateScore",
    "DataCard",
    "Details",
    "Failure",
    "HeldOutLoss",
    "Ledger",
    "LossLine",
    "OtherDetails",
    "PromptDetails",
    "PromptState",
    "RaceResult",
    "SampleRow",
    "Saved",
    "SavedRecord",
    "StepRecord",
    "StepStatus",
    "TraceCounts",
    "TrainedAdapter",
    "WeightDetails",
    "Whole",
    "failure_text",
    "read",
    "report_of_schema_1",
]
