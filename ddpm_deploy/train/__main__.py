"""`python -m ddpm_deploy.train`: ddpm-train by its module's name, as torchrun starts it."""

from ddpm_deploy.cli.train import main

if __name__ == "__main__":
    main()
