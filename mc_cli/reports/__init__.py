"""The words of stages: facts and tables made of typed results. Nothing is read or computed here but what is shown."""
