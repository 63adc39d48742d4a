from pathlib import Path
import rayfed

def test_smoke(tiny, tmp_path):
    r = rayfed.run(tiny("partition.sequence={experiences: 2}", "server.rounds=4", "method.name=fedit"), tmp_path/"a")
    for m in r.metrics: print({k:v for k,v in m.items() if not k.endswith(("matrix","class"))})
    print(r.summary)
    assert 0
