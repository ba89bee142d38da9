"""What a user reads when something is wrong."""

import argparse
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, Registry

from groupmamba_mm.engine.cli import add_cfg_options, explain, run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import CheckpointError, ConfigError, DataError

GOOD = "default_scope = 'mmpretrain'\nmodel = dict(type='A', depth=[1, 2])\n"


@MODELS.register_module()
class CliTestModel:
    def __init__(self, width, depth=1):
        pass


@pytest.fixture
def config(tmp_path):
    def write(text=GOOD, name='config.py'):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def ending(main, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    return ended.value.code, capsys.readouterr().err


def test_errors_for_users_have_no_traceback(capsys):
    def main():
        raise CheckpointError('file a.pth is\nbad; do this')

    assert ending(main, capsys) == (1, 'error: file a.pth is bad; do this\n')


def test_other_errors_show_where_and_end_with_their_cause(capsys):
    def main():
        try:
            {}['a key']
        except KeyError as error:
            raise RuntimeError('outer') from error

    code, shown = ending(main, capsys)
    assert code == 1 and 'Traceback' in shown
    assert shown.splitlines()[-1].startswith('error: KeyError: a key')


def test_success_and_interruption(capsys):
    run_command(lambda: None)

    def main():
        raise KeyboardInterrupt

    code, shown = ending(main, capsys)
    assert code == 130 and '--resume' in shown


def caught(call):
    with pytest.raises(Exception) as error:
        call()
    return explain(error.value)


def test_unknown_types_are_told_with_names_like_them():
    text = caught(lambda: MODELS.build(dict(type='CliTestModle')))
    assert "no model with the type 'CliTestModle'" in text
    assert 'CliTestModel' in text and 'custom_imports' in text


def test_names_of_the_libraries_are_found_too():
    child = Registry('model', parent=MODELS, scope='cli_test')
    child.register_module('CliTestChild', module=dict)
    assert 'CliTestChild' in caught(lambda: MODELS.build(dict(type='CliTestChilt')))


def test_wrong_arguments_are_told_with_their_class():
    text = caught(lambda: MODELS.build(dict(type='CliTestModel', widht=1)))
    assert text == "CliTestModel takes no argument 'widht'; did you mean width?"
    text = caught(lambda: MODELS.build(dict(type='CliTestModel')))
    assert "CliTestModel needs the argument 'width'" in text


def test_memory_and_ports():
    assert 'batch_size' in explain(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate'))
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen()
        with pytest.raises(torch.distributed.DistNetworkError) as error:
            torch.distributed.TCPStore('127.0.0.1', listener.getsockname()[1], 1, is_master=True)
    assert 'the processes cannot meet at' in explain(error.value) and 'PORT=' in explain(
        error.value
    )


def test_a_workers_error_ends_with_its_message():
    text = (
        'Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent '
        'call last):\n  File "a.py"\ngroupmamba_mm.errors.DataError: image a.png is empty\n'
    )
    assert explain(DataError(text)) == 'image a.png is empty'


def test_a_good_config_is_loaded_with_its_options(config):
    cfg = load_config(config(), {'model.depth': [5, 2], 'work_dir': 'here'})
    assert cfg.model.depth == [5, 2] and cfg.work_dir == 'here'


@pytest.mark.parametrize(
    'text, message',
    [
        ('model = dict(', r'config\.py has a syntax error'),
        ("_base_ = './nope.py'", r'base .*nope\.py does not exist'),
        ('x = unknown_name', r'config\.py fails with NameError.*unknown_name'),
        ("custom_imports = dict(imports=['no_such_pkg'])", 'no_such_pkg.*custom_imports'),
        ('optim_wraper = dict()', "'optim_wraper'; did you mean optim_wrapper"),
        ('val_evaluators = dict()', 'did you mean val_evaluator'),
        ("default_scope = 'mmpose'", "default_scope is 'mmpose'.*mmseg"),
    ],
)
def test_broken_configs_are_told(config, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config(f"default_scope = 'mmdet'\n{text}\n"))


def test_the_broken_base_is_named(config):
    config('model = dict(', 'base.py')
    with pytest.raises(ConfigError, match=r'base\.py has a syntax error'):
        load_config(config("_base_ = './base.py'\n"))


def test_usual_variables_are_no_misspelt_keys(config):
    load_config(
        config(
            GOOD + 'test_pipeline = train_pipeline = []\nval_evaluator_abs = {}\n'
            'data_root = "x"\nmodels = {}\nmax_epochs = 3\n'
        )
    )


def test_missing_configs_are_told_with_their_neighbours(config, tmp_path):
    config()
    with pytest.raises(ConfigError, match=r'confg\.py does not exist; did you mean config\.py'):
        load_config(str(tmp_path / 'confg.py'))
    with pytest.raises(ConfigError, match='no config file'):
        load_config(config('', 'config.txt'))


@pytest.mark.parametrize(
    'options, message',
    [
        ({'optim_wraper.lr': 1}, 'did you mean optim_wrapper'),
        ({'zzz': 1}, "no key 'zzz'; the config has default_scope, model"),
        ({'model.depth.7': 1}, 'cfg-options model.depth.7=1'),
    ],
)
def test_broken_options_are_told(config, options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config(), options)


def test_an_option_without_a_value_is_a_usage_error(capsys):
    parser = argparse.ArgumentParser()
    add_cfg_options(parser)
    assert parser.parse_args(['--cfg-options', 'a.b=[1,2]']).cfg_options == {'a.b': [1, 2]}
    with pytest.raises(SystemExit):
        parser.parse_args(['--cfg-options', 'a.b'])
    assert "'a.b' is no key=value" in capsys.readouterr().err


@pytest.mark.parametrize('value', ['[1,2', '[1,(2]', "{'a':(1,2),'b':3}"])
def test_an_option_that_cannot_be_read_is_a_usage_error(value, capsys):
    parser = argparse.ArgumentParser()
    add_cfg_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(['--cfg-options', 'fine=1', f'a.b={value}'])
    assert f'--cfg-options: cannot read {f"a.b={value}"!r}' in capsys.readouterr().err


def test_numpy_values_in_messages_stay_on_one_line():
    assert '\n' not in explain(ValueError(str(np.zeros((3, 3)))))


def test_the_formatter_is_imported_by_many_processes_at_once(tmp_path):
    """yapf alone reads halves of its cache here: some of the processes end in EOFError."""
    command = 'from groupmamba_mm.engine.run_log import import_formatter; import_formatter()'
    environment = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', command], env=environment, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    ends = [(process.communicate()[1], process.returncode) for process in processes]
    assert all(code == 0 for _, code in ends), ends
    assert list(tmp_path.glob('YAPF/*/*.pickle'))
