"""A big teacher, a small student: the teacher's right runs become the student's demos and its training rows.

    python examples/teacher_student.py --teacher Qwen/Qwen2.5-1.5B-Instruct

Shows `teacher=`: a program of the student's structure over another model (any dspy.LM, an API's too). It is asked in
place of the student wherever data is collected; what is scored, trained and returned is the student.

Hardware: a GPU for the teacher above; its scores are not measured yet. With Gemma-3-270M, a base model, as teacher
(`python tests/benchmarks/models.py gemma` gives its folder), on one core of a 2.5 GHz server: 26 minutes, and of the 24
messages of the test the teacher has 0.333 right, the student 0.208 untouched and 0.917 [0.792, 1.000] taught.
"""

from __future__ import annotations

import argparse

import dspy
from tasks import Route, team_match, ticket_data

from bettertogether import BetterTogether, compare, default_model, evaluate, local_lm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of another student")
    parser.add_argument("--teacher", default="Qwen/Qwen2.5-1.5B-Instruct", help="folder or hub id of the teacher")
    parser.add_argument("--limit", type=int, help="messages to use at most")
    arguments = parser.parse_args()

    dspy.configure(adapter=dspy.JSONAdapter())
    student, teacher = dspy.ChainOfThought(Route), dspy.ChainOfThought(Route)
    student.set_lm(local_lm(arguments.model or default_model(), max_tokens=128))
    teacher.set_lm(local_lm(arguments.teacher, max_tokens=128))
    trainset, valset, testset = ticket_data(arguments.limit)

    tests = {
        "teacher": evaluate(teacher, testset, team_match),
        "student": evaluate(student, testset, team_match),
    }
    compiled = BetterTogether(team_match).compile(student, teacher=teacher, trainset=trainset, valset=valset)
    tests["taught student"] = evaluate(compiled, testset, team_match)
    print(compiled.report)
    print(f"\nOn {len(testset)} other messages:\n{compare(tests)}")


if __name__ == "__main__":
    main()
