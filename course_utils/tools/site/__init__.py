"""What is written for readers beside the notebooks: the model card of course-lm."""
