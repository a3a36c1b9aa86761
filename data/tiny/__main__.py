"""`python -m data.tiny`: mp4 clips of puppets with captions."""

if __name__ == "__main__":
    from data.tiny.dataset import make_clips
    from magihuman.cli import run

    run(make_clips, "python -m data.tiny")
