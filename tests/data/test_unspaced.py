"""Languages without spaces between words are noticed; others, and words alone, are not."""

from __future__ import annotations

import pytest

from caption_ray.data import unspaced

SPACED = {
    "English": ["A man riding a wave on top of a surfboard.", "Two dogs play with a ball."],
    "German": [
        "Ein Mann reitet auf einem Surfbrett auf einer Welle.", "Straßenbahnhaltestelle in Köln",
    ],
    "Finnish": ["Kaksi koiraa leikkii punaisella pallolla.", "Polkupyöräilijöitä kahvilassa."],
    "Turkish": ["Bir adam sörf tahtasında kayıyor.", "Ocağı ve buzdolabı olan bir mutfak."],
    "Korean": ["한 남자가 서핑보드 위에서 파도를 타고 있다.", "스토브와 냉장고가 있는 부엌."],
    "Hindi": ["एक आदमी सर्फ़बोर्ड पर लहर की सवारी कर रहा है।"],
    "Arabic": ["رجل يركب موجة على لوح التزلج"],
    "Chinese, cut": ["一 名 男子 在 冲浪板 上 冲浪 。", "一个 有 炉子 和 冰箱 的 厨房"],
    "Japanese, cut": ["二 匹 の 犬 が 芝生 の 上 で 赤い ボール で 遊んで いる"],
    "Thai, cut": ["สุนัข สอง ตัว เล่น ลูกบอล สี แดง บน สนามหญ้า"],
    "English labels": ["dog", "cat"],
    "German labels": ["Straßenbahnhaltestelle", "Geschirrspülmaschine"],
    "English with a sign": ["a sign that says 出口 above a door", "a shop named 全聚德烤鸭店"],
    "marks": ["...", "!"],
    "nothing": [],
}  # fmt: skip
UNSPACED = {
    "Chinese": ["一名男子在冲浪板上冲浪。", "两只狗在草地上玩红色的球", "一个有炉子和冰箱的厨房"],
    "short Chinese": ["一只狗", "两只猫", "红色的球"],
    "Chinese clauses": ["一只狗在草地上奔跑， 一只猫在树下睡觉， 天空很蓝"],
    "Japanese": [
        "サーフボードに乗って波に乗っている男性。",
        "犬が芝生の上で赤いボールで遊んでいる",
    ],
    "Thai": ["สุนัขสองตัวเล่นลูกบอลสีแดงบนสนามหญ้า", "ห้องครัวที่มีเตาและตู้เย็น"],
    "Khmer": ["ឆ្កែពីរក្បាលលេងបាល់ក្រហមនៅលើស្មៅ"],
    "mostly Chinese": ["一只狗在草地上奔跑", "两只狗在草地上玩红色的球", "a dog"],
}


@pytest.mark.parametrize("language", SPACED)
def test_words_with_spaces_between_them_are_no_reason_to_warn(language: str) -> None:
    assert unspaced.warning(SPACED[language]) is None


@pytest.mark.parametrize("language", UNSPACED)
def test_captions_without_spaces_are_noticed(language: str) -> None:
    text = unspaced.warning(UNSPACED[language])
    assert text is not None and "use `characters`" in text and "put spaces between words" in text


def test_the_warning_has_the_figures() -> None:
    text = unspaced.warning(["一名男子在冲浪板上冲浪", "两只狗"])
    assert text is not None and "1.0 words of 7.0 characters" in text
