"""Generated Chinese text: sentences from lists of words, without blanks."""

from __future__ import annotations

import random

SUBJECTS = (
    "我们 他们 老师 学生 这位工程师 北京大学 研究人员 小猫 邻居 图书馆 那家公司 科学家".split()
)
TIMES = "今天 昨天晚上 明年春天 上个星期 二〇二四年 从前 每天早上 有时候 最近 周末".split()
VERBS = "学习 研究 讨论 发现 喜欢 参观 设计 训练 比较 翻译 购买 描述 改进 忘记 记录".split()
OBJECTS = (
    "语言模型 中国历史 一本新书 数学问题 长城 人工智能 天气变化 音乐 古代文字 红烧肉 自行车 "
    "海洋动物 经济政策 程序设计 电影剧本 太阳能电池 城市交通 传统节日 围棋比赛 茶叶"
).split()
TAILS = "，但是没有成功 ，并且写了一份报告 ，因为时间很充足 ，大家都很高兴 ，你觉得怎么样".split()
ENDS = "。 ！ ？ …… ；".split()

MIXED = [
    "GPT 模型在 2024 年取得了很大进步 😀🎉，准确率达到 98.5%。",
    "def 学习(模型):\n\treturn 模型.train()  # 训练\r\n",
    "他说：“Hello, world！”然后就离开了。\n\n  缩进的一行\t制表符\n",
    "全角　空格、半角 空格,  two  blanks　",
    "繁體字與簡体字：學習、學习；日本語のテキスト、한국어 문장。",
    "▁ the sign that SentencePiece writes for a blank ▁▁ ▅ ⁇",
    "<|endoftext|></s><unk><s><0xE4><0xB8><0xAD>",
    "𠮷野家 𡨸喃 龘龘 👨‍👩‍👧‍👦 e\u0301 é ﬁ \u200b\u2028\ufeff",
    " ",
    "\n",
    "",
]


def sentences(count: int, seed: int = 3) -> list[str]:
    """Return `count` random sentences, the same at every call."""
    draw = random.Random(seed)

    def one() -> str:
        middle = draw.choice(VERBS) + draw.choice(["了", "过", "着", ""]) + draw.choice(OBJECTS)
        tail = draw.choice(TAILS) if draw.random() < 0.4 else ""
        order = [draw.choice(TIMES), draw.choice(SUBJECTS)]
        return "".join(draw.sample(order, 2)) + middle + tail + draw.choice(ENDS)

    return [one() for _ in range(count)]


def documents(count: int, seed: int = 3) -> list[str]:
    """Return `count` documents of twenty sentences in paragraphs of five."""
    lines = sentences(20 * count, seed)
    paragraphs = ["".join(lines[i : i + 5]) for i in range(0, len(lines), 5)]
    return ["\n".join(paragraphs[i : i + 4]) + "\n" for i in range(0, len(paragraphs), 4)]
