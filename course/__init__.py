"""Six assignments made from the project's own files: functions to write beside the papers, public
tests that grade any correct implementation, and mistakes that those tests are known to catch."""
