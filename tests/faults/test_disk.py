"""A disk that is full, in a training as it is started by a user."""

import resource

from groupmamba_mm.checkpoint.saving import newest_whole_checkpoint

from .launching import Launch, differing, last_checkpoint


def test_a_file_that_cannot_be_written_ends_with_one_line(tmp_path, whole):
    """A limit of the process stands for the disk: the system refuses the bytes after it."""
    launch = Launch(tmp_path, file_limit=20_000)
    assert launch.wait() == [1, 1]
    last = launch.log(0).strip().splitlines()[-1]
    assert (
        last.startswith('error: ')
        and 'epoch_' in last
        and 'was not written: File too large' in last
    )
    assert 'Traceback' not in launch.log(0)
    names = sorted(file.name for file in tmp_path.glob('*.p*') if file.suffix != '.py')
    assert all(name.endswith('.pth') for name in names)  # nothing half
    if names:
        assert newest_whole_checkpoint(tmp_path, print) is not None
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert Launch(tmp_path, resume=1).wait() == [0, 0]
    assert differing(last_checkpoint(tmp_path), whole) == []
