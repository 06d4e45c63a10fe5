"""Where pictures lie: the order of reading, and fingerprints that later versions still know."""

from __future__ import annotations

from caption_ray.data.locations import Cell, File, Location, WebAddress, ZipEntry, readers
from caption_ray.data.order import WINDOW_BLOCKS, shuffled
from caption_ray.data.rows import fingerprint
from caption_ray.data.sources import Picture, Record

BOX = [{"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}]
COCO = [
    Record(Picture(1, "a.jpg", 64, 48, ["a dog"], BOX), File("/data/train/a.jpg")),
    Record(
        Picture(2, "b.jpg", 0, 0, ["a cat", "two cats"], []),
        ZipEntry("s3://b/train.zip", 30, 100, 8, 123456, 222, 7),
    ),
    Record(Picture(3, "c.jpg", 0, 0, ["x"], []), None),
]


def test_fingerprints_of_coco_are_those_of_the_first_version() -> None:
    """An ingest that died is completed by a newer version, which must know its shards again."""
    known = {
        256: "981f0728eca28f651f41ebba562454a59bab8b99e7b6528096178edb9ac524fc",
        None: "ca43ce0b21465c84e03efae1edbed7b4bb8164f60c767c40dc7a056c17d4dc25",
    }
    for image_size, digest in known.items():
        assert fingerprint({"train": [COCO]}, image_size) == digest


def test_every_kind_of_location_has_a_fingerprint_of_its_own() -> None:
    cell = Cell("/a", 0, 1, "image")
    kinds: list[Location | None] = [None, File("/a"), cell, WebAddress("/a")]
    picture = Picture(1, "a.jpg", 0, 0, ["a dog"], [])
    digests = {fingerprint({"train": [[Record(picture, kind)]]}, None) for kind in kinds}
    assert len(digests) == len(kinds)


def cells(blocks: int, rows: int) -> list[Record]:
    return [
        Record(Picture(row, "", 0, 0, ["a"], []), Cell(f"/{block // 3}", block % 3, row, "image"))
        for block in range(blocks)
        for row in range(rows)
    ]


def blocks_of(records: list[Record]) -> set[object]:
    return {record.location.block for record in records if isinstance(record.location, Cell)}


def test_the_shuffle_keeps_row_groups_together_and_mixes_several() -> None:
    records = cells(blocks=40, rows=100)
    order = shuffled(records, seed=0, together=500)
    assert sorted(map(id, order)) == sorted(map(id, records))
    assert order == shuffled(records, seed=0, together=500) != shuffled(records, 1, 500)
    reads = 0
    for start in range(0, len(order), 500):
        part = order[start : start + 500]
        assert WINDOW_BLOCKS <= len(blocks_of(part)) <= 10
        reads += len(blocks_of(part))
        assert [r.picture.image_id for r in part] != sorted(r.picture.image_id for r in part)
    assert reads == 40, "each row group is read by one task alone"


def test_large_row_groups_are_read_by_few_tasks() -> None:
    order = shuffled(cells(blocks=10, rows=1000), seed=0, together=500)
    reads = [len(blocks_of(order[start : start + 500])) for start in range(0, len(order), 500)]
    assert max(reads) <= 2 * WINDOW_BLOCKS and sum(reads) <= 20 * WINDOW_BLOCKS + 4


def test_readers_cover_every_place_once() -> None:
    locations: list[Location | None] = [None, File("/nowhere"), WebAddress("http://[")]
    ((places, _),) = readers(locations)
    assert places == [0, 1, 2]
    assert list(readers([])) == []
