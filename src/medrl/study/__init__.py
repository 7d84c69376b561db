"""The papers' studies as one command: specialists, matrices, what is significant, a page. See docs/study.md."""
