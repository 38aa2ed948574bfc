"""Run models: numpy and one backend; none but the backend torch needs torch or transformers."""
