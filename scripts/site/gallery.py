"""The gallery: pictures of patterns, drawn by farlight when the site is built, with their density and hops.

`ENTRIES` is the list: (expression as on the command line, English, Chinese). Pictures have 96 tokens: queries down, keys
across.
"""

from __future__ import annotations

from pathlib import Path

import farlight as fl

TOKENS = 96

ENTRIES = (
    ("full()", "Every token sees every other: n² links.", "每个词看见所有词：n² 条连接。"),
    ("causal()", "A token sees itself and what came before.", "每个词只看自己和前文。"),
    ("window(8)", "The neighbours: local syntax, phrases.", "邻居：局部语法、短语。"),
    (
        "window(8) | global_tokens([0, -1])",
        "Neighbours, and two global tokens: any two tokens are two hops apart.",
        "邻居加两座灯塔：任意两个词相距两跳。",
    ),
    (
        "window(4) | global_tokens([0]) | random_keys(2)",
        "Neighbours, a lighthouse and random far keys: a small world.",
        "邻居、灯塔与随机的远方：小世界。",
    ),
    (
        "window(6, dilation=3)",
        "Every third neighbour: three times the range at the same cost.",
        "每隔三个看一个：同样代价，三倍范围。",
    ),
    (
        "causal() & (window(8) | strided(12))",
        "The past by neighbourhood and by period (Child et al. 2019).",
        "前文的邻域与周期（Child 等，2019）。",
    ),
    (
        "streaming(4, 16)",
        "Attention sinks and a window: generation in constant memory (Xiao et al. 2023).",
        "汇聚点加窗口：恒定内存的生成（Xiao 等，2023）。",
    ),
    (
        "streaming(4, 12) | landmarks(12)",
        "The same with a landmark in twelve, which relays the far past.",
        "同上，再加每十二个词一个地标，转达久远的前文。",
    ),
    ("bigbird(8, 2)", "Blocks: window, global, random (BigBird, Zaheer et al. 2020).", "分块：窗口、全局、随机（BigBird）。"),
    ("longformer(16)", "Window and a global token (Longformer, Beltagy et al. 2020).", "窗口与全局标记（Longformer）。"),
    (
        "longnet([24, 96], [1, 4])",
        "Segments, each longer and sparser (LongNet, Ding et al. 2023).",
        "越长越稀的分段（LongNet）。",
    ),
    (
        "logsparse()",
        "Distances 1, 2, 4, 8, …: every earlier token in log n hops (Li et al. 2019).",
        "距离 1、2、4、8……：log n 跳到达任何前文。",
    ),
    (
        'sparse_transformer(12, kind="fixed")',
        "Blocks and their last columns (Sparse Transformer).",
        "分块与每块末列（Sparse Transformer）。",
    ),
    ("star()", "One relay and the neighbours (Star-Transformer, Guo et al. 2019).", "一个中继加邻居（Star-Transformer）。"),
    (
        "documents(lengths=[20, 46, 30]) & causal()",
        "Packed documents that do not see each other.",
        "拼在一起、互不相见的文档。",
    ),
    ("prefix_lm([24])", "A prefix that sees itself whole, then causal.", "前缀互相可见，其后因果。"),
    ("neighborhood((8, 12), 3)", "An image of 8 × 12: neighbours in two dimensions.", "8 × 12 的图像：二维的邻居。"),
    ("blocked_window(1, block=12)", "Whole blocks and their neighbours.", "整块与相邻块。"),
    ("causal() & random_blocks(2, block=8)", "Random blocks of the past.", "前文中的随机块。"),
    ("window(24) - window(8)", "A difference: neither too near nor too far.", "差集：不太近，也不太远。"),
    ("~window(16)", "A complement: everything but the neighbours.", "补集：邻居之外的一切。"),
)

CAPTIONS = {
    "gallery.md": ("{density} of all pairs, {hops} hops", "not every pair is connected"),
    "gallery.zh.md": ("占全部词对的 {density}，平均 {hops} 跳", "并非任意两个词都相通"),
}


def write(pages: Path) -> None:
    """Draw every pattern, and append the pictures to gallery.md and gallery.zh.md."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder = pages / "gallery"
    folder.mkdir()
    figures: list[tuple[str, float, fl.SmallWorld]] = []
    for number, (text, _, _) in enumerate(ENTRIES):
        pattern = fl.parse(text)
        axes = plt.subplots(figsize=(2.4, 2.4))[1]
        pattern.plot(TOKENS, ax=axes)
        axes.set(title="", xlabel="", ylabel="", xticks=[], yticks=[])
        axes.figure.savefig(folder / f"{number}.png", dpi=120, bbox_inches="tight", pad_inches=0.03)
        plt.close()
        figures.append((text, pattern.density(TOKENS), fl.smallworld(pattern, TOKENS)))
    for language, (page, (caption, apart)) in enumerate(CAPTIONS.items()):
        cards = []
        for number, (text, density, world) in enumerate(figures):
            hops = f"{world.hops:.2f}" if world.unreachable == 0 else f"{world.hops:.2f} ({apart})"
            cards.append(
                f"-   ![{text}](gallery/{number}.png){{ width=240 }}\n\n    `{text}`\n\n    {ENTRIES[number][1 + language]}\n\n"
                f"    {caption.format(density=f'{density:.1%}', hops=hops)}"
            )
        grid = '<div class="grid cards gallery" markdown>\n\n' + "\n\n".join(cards) + "\n\n</div>\n"
        head = (pages / page).read_text(encoding="utf-8")
        (pages / page).write_text(f"{head}\n{grid}", encoding="utf-8")
