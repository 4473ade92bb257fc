# ruff: noqa: E501, RUF001 - lines are as long as the text wants, in any writing
"""How texts of many kinds and languages begin, written for this purpose: a model continues them while it is calibrated.

None of them is in ``evaluation/corpus.py``, so that what a model is judged by is not what it was calibrated on.
"""

from __future__ import annotations

_ENGLISH = (
    "The ferry company announced on Thursday that it will cut two of its six daily crossings from next month, citing the price of fuel and a shortage of trained crew. Passengers who have already bought tickets for the cancelled",
    "Photosynthesis is the process by which green plants, algae and some bacteria turn light into chemical energy. In the first stage, which takes place in the membranes of the chloroplast, water is split into oxygen, protons and",
    "When Ida opened the cellar door she found the lamp already lit. Somebody had swept the floor, stacked the empty bottles along the wall, and left a chair in the middle of the room with its back to the stairs. She counted to ten, and then",
    "Subject: Re: Delivery of the replacement parts\n\nDear Mr. Okafor,\n\nThank you for your message of 3 May. I have spoken with our warehouse this morning, and they confirm that the two pumps left on Friday. The invoice that you received is",
    "How to repot a houseplant\n\n1. Water the plant a day before, so that the roots hold together.\n2. Choose a pot that is about two fingers wider than the old one, with a hole in the bottom.\n3. Put a layer of",
    "Abstract. We study the effect of sleep duration on reaction time in 214 adults over twelve weeks. Participants wore a wrist sensor and completed a short test each morning. After controlling for age and caffeine, we find that",
    "Q: What is the difference between weather and climate?\nA: Weather is what happens in the atmosphere on a given day at a given place, such as rain or wind. Climate is the average of",
    "5. Termination. Either party may terminate this Agreement by giving not less than thirty (30) days' written notice to the other party. Upon termination, the Licensee shall immediately cease to use the Software and shall",
    "I bought these headphones six weeks ago and have used them nearly every day since. The sound is warmer than I expected and they are light enough to forget about. What I don't like: the button on the left side",
    "In 1869 the first railway across the continent was completed. Until then, a journey from one coast to the other had taken about six months by wagon or several weeks by sea. The new line, which was built by two companies from both ends, had",
)

_CODE = (
    'import argparse\nimport csv\nfrom pathlib import Path\n\n\nclass Inventory:\n    """Keeps the number of each item in stock."""\n\n    def __init__(self) -> None:\n        self._items: dict[str, int] = {}\n\n    def add(self, name: str, count: int = 1) -> None:\n        if count < 0:\n            raise ValueError(f"count must not be negative, got {count}")\n',
    'export async function fetchUser(id: string): Promise<User | null> {\n  const response = await fetch(`/api/users/${encodeURIComponent(id)}`, {\n    headers: { Accept: "application/json" },\n  });\n  if (response.status === 404) return null;\n  if (!response.ok) {\n',
    "#include <stdlib.h>\n#include <string.h>\n\ntypedef struct node {\n    char *key;\n    int value;\n    struct node *next;\n} node_t;\n\nstatic unsigned long hash(const char *s) {\n    unsigned long h = 5381;\n    while (*s) {\n",
    "public class Account {\n    private final String owner;\n    private long cents;\n\n    public Account(String owner) {\n        this.owner = Objects.requireNonNull(owner);\n    }\n\n    public synchronized void deposit(long amount) {\n        if (amount <= 0) {\n",
    "use std::collections::HashMap;\n\npub fn parse(line: &str) -> Result<(String, u32), ParseError> {\n    let mut parts = line.splitn(2, '=');\n    let name = parts.next().ok_or(ParseError::Empty)?.trim();\n    let value = parts\n",
    "CREATE TABLE orders (\n    id INTEGER PRIMARY KEY,\n    customer_id INTEGER NOT NULL REFERENCES customers (id),\n    placed_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP\n);\n\nSELECT c.name, COUNT(*) AS orders\nFROM customers c\nJOIN",
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n  <meta charset="utf-8">\n  <title>Opening hours</title>\n  <style>\n    table { border-collapse: collapse; }\n    td, th { padding: 0.5em;',
    '#!/bin/sh\nset -eu\n\n# Keep the seven newest backups and delete the rest.\ndir="${1:-/var/backups}"\nfor file in $(ls -1t "$dir"/*.tar.gz | tail -n +8); do\n',
)

_RECORDS = (
    '{"order": {"id": "A-20417", "status": "shipped", "items": [{"sku": "TB-119", "quantity": 2, "price": 14.90}, {"sku": "LK-007", "quantity": 1, "price": 89.00}], "address": {"street": "12 Mill Lane",',
    "| Country | Capital | Population (millions) | Area (km²) |\n|---|---|---|---|\n| Portugal | Lisbon | 10.4 | 92,212 |\n| Kenya | Nairobi | 55.1 |",
    "2024-02-11 08:14:03,412 INFO  [main] Server started on port 8080\n2024-02-11 08:14:09,877 WARN  [pool-2] Slow query (1,204 ms): SELECT * FROM events WHERE\n2024-02-11 08:14:10,002 ERROR",
    'version: 2\nservices:\n  web:\n    image: nginx:1.25\n    ports:\n      - "80:80"\n    depends_on: [api]\n  api:\n    build: ./api\n    environment:\n',
    "Let $f(x) = x^3 - 3x + 1$. Then $f'(x) = 3x^2 - 3$, which is zero at $x = \\pm 1$. Since $f''(1) = 6 > 0$, the function has a local minimum at $x = 1$, and",
    "Problem: A train leaves at 9:40 and travels at 80 km/h. Another leaves the same station at 10:10 on a parallel track at 120 km/h. When does the second overtake the first?\nSolution: At 10:10 the first train is",
)

_LANGUAGES = (
    "Die Stadtbibliothek bleibt wegen Umbauarbeiten bis Ende März geschlossen. Ausgeliehene Bücher können in dieser Zeit im Rathaus abgegeben werden, wo auch ein kleiner Lesesaal eingerichtet wurde. Wer einen Ausweis besitzt, darf",
    "Le marché du samedi commence avant l'aube. Les maraîchers déchargent leurs cageots, on compare les prix à voix basse, et le premier café se boit debout, derrière l'étal du poissonnier. Vers huit heures, quand",
    "La energía solar se ha convertido en una de las fuentes más baratas de electricidad. Sin embargo, su producción depende del clima y de la hora del día, por lo que las redes necesitan baterías o",
    "Per preparare il pane servono pochi ingredienti: farina, acqua, sale e lievito. Si mescola tutto in una ciotola capiente e si lascia riposare l'impasto per un'ora. Quando ha raddoppiato il volume,",
    "A reunião do conselho foi adiada para a próxima terça-feira porque faltavam documentos. O presidente explicou que o orçamento ainda não foi aprovado e que os vereadores",
    "Het museum opent dit najaar een nieuwe afdeling over de geschiedenis van de scheepvaart. Bezoekers kunnen er oude kaarten bekijken, zelf een knoop leren leggen en",
    "Wczoraj wieczorem w górach spadło prawie pół metra śniegu. Ratownicy ostrzegają turystów przed lawinami i proszą, aby",
    "Учёные обнаружили на дне озера остатки древнего поселения. По их словам, дома были построены около трёх тысяч лет назад из дуба и глины, а жители занимались",
    "Bugün hava çok sıcak olduğu için çocuklar parkta değil evde oynadı. Akşamüstü rüzgâr çıkınca annesi pencereyi açtı ve",
    "人工智能正在改变许多行业。医生用它来分析影像,工厂用它来检查产品的质量,学校也开始用它来帮助学生学习。但是,专家提醒说,",
    "昨日の夜、駅前の小さな本屋が四十年の歴史に幕を下ろした。店主の田中さんは「最後の日にこんなに大勢の人が来てくれるとは思わなかった」と話し、",
    "이 요리는 재료가 간단하고 만들기도 쉽다. 먼저 감자를 얇게 썰어 찬물에 십 분 정도 담가 둔다. 그동안 양파와 당근을",
    "تقع المدينة القديمة على تل يطل على البحر، وتحيط بها أسوار بُنيت قبل أكثر من خمسمئة عام. في الصباح يفتح التجار محلاتهم",
    "गाँव के बाहर एक पुराना कुआँ था जिसका पानी गर्मियों में भी ठंडा रहता था। हर सुबह औरतें वहाँ पानी भरने आतीं और",
    "Hà Nội vào mùa thu rất đẹp. Buổi sáng trời se lạnh, mùi hoa sữa thoang thoảng trên các con phố, và người ta",
    "Pemerintah kota akan menanam sepuluh ribu pohon di sepanjang sungai tahun ini. Selain mengurangi banjir, pohon-pohon itu",
)

# Neighbors are of different kinds, so that few rows have a bit of each.
_KINDS = (_ENGLISH, _CODE, _LANGUAGES, _RECORDS)
OPENINGS = tuple(kind[i] for i in range(max(map(len, _KINDS))) for kind in _KINDS if i < len(kind))
