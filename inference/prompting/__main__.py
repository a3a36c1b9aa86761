"""`python -m inference.prompting`: write or check prompts of the three-part form."""

from inference.prompting.rewrite import main

if __name__ == "__main__":
    main()
