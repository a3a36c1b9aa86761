"""`python -m data.tiny`: clips of puppets as mp4 files with their captions."""

if __name__ == "__main__":
    from data.tiny.render import make_clips
    from magihuman.cli import run

    run(make_clips, "python -m data.tiny")
