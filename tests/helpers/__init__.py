"""What several test files share, by subject. No test imports another test, nor conftest."""
