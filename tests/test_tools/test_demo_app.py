"""The page to try a model by hand: its answers are the predictor's, and a browser shows them."""

import base64
import json
import shutil
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import cv2
import numpy as np
import pytest

from groupmamba_mm.errors import CheckpointError, LaunchError
from groupmamba_mm.inference import Predictor
from tests.conftest import load_tool
from tests.test_inference.test_predictor import CONFIGS, place  # noqa: F401, a fixture

TOOL = load_tool('demo_app.py')


@contextmanager
def served(place, task):  # noqa: F811
    server = TOOL.make_server(
        ['--config', CONFIGS[task], '--checkpoint', str(place / f'{task}.pth')]
        + ['--device', 'cpu', '--score-thr', '0', '--port', '0']
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_address[1]}/'
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def post(address, content):
    try:
        with urllib.request.urlopen(f'{address}predict', content, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize('task', sorted(CONFIGS))
def test_answers_are_the_predictors(task, place, one_thread):  # noqa: F811
    image = place / 'images/below/c.png'
    with served(place, task) as address:
        status, said = post(address, image.read_bytes())
        assert status == 200
        assert said['result'] == Predictor(CONFIGS[task], place / f'{task}.pth', 'cpu', 0.0)(image)
        assert (said['width'], said['height']) == (96, 48) and said['milliseconds'] > 0
        painted = np.frombuffer(base64.b64decode(said['painted']), np.uint8)
        painted = cv2.imdecode(painted, cv2.IMREAD_COLOR)
        assert painted.shape == (48, 96, 3)
        assert not np.array_equal(painted, cv2.imread(str(image)))
        for content, message in ((b'text', 'the file (4 bytes) is no image'), (b'', '0 bytes')):
            status, said = post(address, content)
            assert status == 400 and message in said['error']
        with pytest.raises(urllib.error.HTTPError, match='404'):
            urllib.request.urlopen(f'{address}etc/passwd')


def test_what_cannot_be_served_is_told(place):  # noqa: F811
    with served(place, 'cls') as address:
        port = address.strip('/').rpartition(':')[2]
        common = ['--config', CONFIGS['cls'], '--device', 'cpu', '--port', port, '--checkpoint']
        with pytest.raises(LaunchError, match=f'cannot listen on 127.0.0.1:{port}'):
            TOOL.make_server([*common, str(place / 'cls.pth')])
        with pytest.raises(CheckpointError, match='does not fit'):
            TOOL.make_server([*common, str(place / 'seg.pth')])


@pytest.fixture
def browser():
    """A headless Chromium, as Debian's packages chromium and chromium-driver bring it."""
    webdriver = pytest.importorskip('selenium.webdriver')
    chrome = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'chrome'))), None)
    driver = shutil.which('chromedriver')
    if not (chrome and driver):
        pytest.skip('no Chromium with its chromedriver (apt-get install chromium chromium-driver)')
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for argument in ('--headless=new', '--no-sandbox', '--disable-gpu', '--window-size=900,900'):
        options.add_argument(argument)
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


#: Drops a file as a user does, which WebDriver itself cannot.
DROP = """
const [name, content] = arguments;
const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], name));
document.getElementById('drop').dispatchEvent(
  new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
"""


@pytest.mark.slow
@pytest.mark.parametrize('task', sorted(CONFIGS))
def test_a_browser_shows_what_was_found(task, place, browser, tmp_path, one_thread):  # noqa: F811
    from selenium.webdriver.support.ui import WebDriverWait

    def text(name):
        return browser.find_element('id', name).text

    image = place / 'images/below/c.png'
    found = Predictor(CONFIGS[task], place / f'{task}.pth', 'cpu', 0.0)(image)
    with served(place, task) as address:
        browser.get(address)
        assert CONFIGS[task] in browser.find_element('tag name', 'h1').text
        browser.find_element('id', 'file').send_keys(str(image))  # the button
        WebDriverWait(browser, 60).until(lambda _: ' ms' in text('speed'))
        assert text('speed').startswith('96 x 48 pixels: ') and not text('error')
        painted = browser.find_element('id', 'painted')
        WebDriverWait(browser, 10).until(lambda _: painted.get_property('naturalWidth') == 96)
        assert painted.is_displayed()
        labels = {
            'cls': [entry['label'] for entry in found.get('top', ())],
            'det': [entry['label'] for entry in found.get('instances', ())],
            'seg': list(found.get('share', ())),
        }[task]
        rows = text('found').splitlines()
        assert len(rows) == len(labels) + 1 and len(labels) > 0
        assert all(row.startswith(label) for row, label in zip(rows[1:], labels))
        browser.save_screenshot(str(tmp_path / 'page.png'))

        for name, content, part, message in (
            ('broken.jpg', (place / 'images/broken.jpg').read_bytes(), 'error', 'is no image'),
            ('a.png', (place / 'images/a.png').read_bytes(), 'speed', '64 x 64 pixels'),
        ):
            browser.execute_script(DROP, name, base64.b64encode(content).decode())
            WebDriverWait(browser, 60).until(lambda _, p=part, m=message: m in text(p))
        assert not text('error')
    assert not [
        line
        for line in browser.get_log('browser')
        if line['level'] == 'SEVERE'
        and '400' not in line['message']
        and 'favicon' not in line['message']
    ]
