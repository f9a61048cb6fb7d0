"""What the known-answer pages of ``ocr_pages.py`` say: sentences, names, programs and formulas.

``{number}`` stands for a number that is drawn anew for every page.  A new Chinese character or formula needs
``fonts/make_fonts.py`` to be run again; a test says so.
"""

from __future__ import annotations

TITLES = {
    "en": (
        "Notes on the Annual Survey",
        "Minutes of the Library Board",
        "Report of the Water Office",
        "A Short Guide to the Archive",
        "Maintenance of the Old Bridge",
        "Summary for the Second Quarter",
    ),
    "zh": ("年度工作总结", "会议记录", "项目进展说明", "设备维护手册", "城市供水报告", "图书馆借阅办法"),
}
SENTENCES = {
    "en": (
        "The committee met on Monday and approved {number} of the proposals that were submitted in spring.",
        "Visitors may borrow up to {number} books at a time, provided that a valid card is shown at the desk.",
        "Most of the damage was found near the northern gate, where the wall is about {number} years old.",
        "A second reading of the meter showed {number} units, slightly more than the engineers had expected.",
        "Please return the signed form before the end of the month; late forms will not be considered.",
        "The river rose quickly during the night, but the new barrier kept every street in the valley dry.",
        "Because the old pump was noisy, the workshop replaced it with a quiet one made by a local firm.",
        "Each sample was weighed twice, dried for {number} minutes and weighed again on the same scale.",
        "Members who cannot attend should send a written note to the secretary by Friday afternoon.",
        "The exhibition opens at nine, closes at half past five, and is free for children under twelve.",
        "In the appendix, table {number} lists the average temperature of every week since the survey began.",
        "Nobody could explain why the southern line carried so few passengers on the first day.",
        "The price of paper went up by {number} percent, so the next volume will be printed in fewer copies.",
        "Our guide pointed out a quiet village, a stone mill and two fields of yellow flowers.",
        "Quick fixes rarely survive the winter, which is why the joints were sealed with fresh lead.",
        "Of the {number} letters in the box, only seven were dated, and just one of them was complete.",
    ),
    "zh": (
        "本次会议共有{number}人参加，讨论了下半年的工作安排。",
        "读者凭有效证件每次可以借阅图书{number}册，借期为三十天。",
        "设备应当保持清洁，每隔{number}小时检查一次油温和压力。",
        "根据统计，全市去年的用水总量比前年增加了百分之{number}。",
        "项目组在春季完成了现场测量，秋季开始施工。",
        "如果发现异常声音，请立即停止运行，并通知维修人员。",
        "这座石桥建于{number}年前，至今仍然是两岸居民往来的主要通道。",
        "合同自双方签字盖章之日起生效，有效期为两年。",
        "新的办法简化了手续，申请人只需要提交一份材料。",
        "第{number}号文件规定，各单位应在月底以前上报结果。",
        "实验表明，温度升高时，材料的强度会明显下降。",
        "为了保证质量，每批产品都要经过三次独立的检验。",
        "今年夏天雨水较多，农田排水工程发挥了重要作用。",
        "图书馆的开放时间为上午九点到下午五点，节假日照常开放。",
        "经过认真研究，委员会同意采用第二种方案。",
        "仓库现存纸张{number}箱，预计可以使用到明年三月。",
    ),
}
# Column heads, then row heads, of tables.
TABLE_HEADS = {
    "en": ("Region", "Orders", "Price", "Weight", "Change", "Stock", "Length", "Score"),
    "zh": ("地区", "数量", "单价", "重量", "变化", "库存", "长度", "得分"),
}
TABLE_GROUPS = {"en": ("First half", "Second half"), "zh": ("上半年", "下半年")}
TABLE_ROWS = {
    "en": ("North", "South", "East", "West", "Centre", "Harbour", "Airport"),
    "zh": ("北部", "南部", "东部", "西部", "中心", "港口", "机场"),
}
# The ring's text and the line under the star, of seals.
SEAL_RINGS = {
    "en": ("NORTH RIVER TRADING COMPANY", "CITY LIBRARY OF GREENFIELD", "HARBOUR PILOT ASSOCIATION"),
    "zh": ("东海市长江设备有限公司", "北方城市供水集团有限公司", "南山区第二实验学校", "中原材料检验研究中心"),
}
SEAL_LINES = {"en": ("APPROVED", "RECEIVED", "CONTRACT"), "zh": ("合同专用章", "财务专用章", "业务专用章")}
PROGRAMS = (
    """\
def mean(values):
    total = 0
    for value in values:
        if value is None:
            continue
        total += value
    return total / {number}
""",
    """\
class Queue:
    def __init__(self, size={number}):
        self.items = []
        self.size = size

    def put(self, item):
        if len(self.items) < self.size:
            self.items.append(item)
            return True
        return False
""",
    """\
int main(void) {
    int count = {number};
    for (int i = 0; i < count; i++) {
        if (i % 3 == 0) {
            printf("%d\\n", i);
        }
    }
    return 0;
}
""",
    """\
SELECT name, COUNT(*) AS orders
FROM customers
JOIN sales ON sales.customer = customers.id
WHERE sales.amount > {number}
GROUP BY name
ORDER BY orders DESC;
""",
    """\
server:
  port: {number}
  workers: 4
  logging:
    level: info
    folder: /var/log/server
  limits:
    requests: 100
""",
    """\
for file in "$folder"/*.txt; do
    lines=$(wc -l < "$file")
    if [ "$lines" -gt {number} ]; then
        echo "$file: $lines"
    fi
done
""",
    """\
function area(shape) {
  switch (shape.kind) {
    case "square":
      return shape.side * shape.side;
    case "circle":
      return {number} * shape.radius;
    default:
      return null;
  }
}
""",
)
FORMULAS = (
    r"x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}",
    r"\sum_{i=1}^{n} i^2 = \frac{n(n+1)(2n+1)}{6}",
    r"\int_{0}^{\infty} e^{-x^2} dx = \frac{\sqrt{\pi}}{2}",
    r"\lim_{n \to \infty} \left(1 + \frac{1}{n}\right)^n = e",
    r"E = mc^2",
    r"a^2 + b^2 = c^2",
    r"\frac{\partial u}{\partial t} = \alpha \frac{\partial^2 u}{\partial x^2}",
    r"\nabla \times E = -\frac{\partial B}{\partial t}",
    r"P(A \mid B) = \frac{P(B \mid A) P(A)}{P(B)}",
    r"\sigma = \sqrt{\frac{1}{N} \sum_{i=1}^{N} (x_i - \mu)^2}",
    r"f(x) = \frac{1}{\sigma \sqrt{2\pi}} e^{-\frac{(x-\mu)^2}{2\sigma^2}}",
    r"\cos^2 \theta + \sin^2 \theta = 1",
    r"e^{i\pi} + 1 = 0",
    r"\int_{a}^{b} f(x) dx = F(b) - F(a)",
    r"A = \begin{pmatrix} a & b \\ c & d \end{pmatrix}",
    r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix} \begin{pmatrix} x \\ y \end{pmatrix}",
    r"\frac{d}{dx} x^n = n x^{n-1}",
    r"S_n = \frac{a_1 (1 - q^n)}{1 - q}",
    r"\prod_{k=1}^{n} k = n!",
    r"\log_2 x = \frac{\ln x}{\ln 2}",
    r"\left| \frac{x - y}{x + y} \right| \leq 1",
    r"\lambda_1 + \lambda_2 = \alpha \beta - \gamma",
    r"F = G \frac{m_1 m_2}{r^2}",
    r"x_{n+1} = x_n - \frac{f(x_n)}{f'(x_n)}",
    r"\sqrt[3]{x^3 + y^3} \neq x + y",
    r"\frac{1}{f} = \frac{1}{u} + \frac{1}{v}",
    r"\forall \epsilon > 0, \exists \delta > 0",
    r"A \cup (B \cap C) = (A \cup B) \cap (A \cup C)",
    r"\Delta G = \Delta H - T \Delta S",
    r"\hat{y} = \beta_0 + \beta_1 x_1 + \beta_2 x_2",
)
