"""The command line and what it runs: demo, benchmarks, profiles, plans, checks. Nothing else imports these."""
