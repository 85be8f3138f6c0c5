"""`python -m course_utils` is `course`."""

from course_utils.tools.cli import main

main()
