"""`python -m course_utils` is `course`."""

from course_utils.tools.cli import main

if __name__ == "__main__":  # and not in the processes that run notebooks side by side
    main()
