"""Run exported models with numpy and one backend; only the backend torch needs PyTorch."""
