"""The sources that are read from one path each, in one table: name on the command line -> reader and terms."""

from collections.abc import Callable
from dataclasses import dataclass

from medrl.data.readers import benchmarks, papers, trainers, vqa
from medrl.data.readers.result import ImportResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One source of questions."""

    title: str
    read: Callable[..., ImportResult]
    """``(path, pictures, *, split, quiet)``."""
    license: str
    citation: str
    example: str
    """What to give as PATH."""
    folders: tuple[str, ...] = ()
    """Sub-folders of the images' folder in which bare file names may lie."""


_OMNIMED_TERMS = "OmniMedVQA's: each data set in it has its own terms, several are non-commercial"
_AS_GIVEN = "that of the rows' source; it is not recorded in them"

SOURCES: dict[str, Source] = {
    "med-r1": Source(
        title="a split file of Med-R1, or a folder of them",
        read=papers.read_med_r1,
        license=_OMNIMED_TERMS,
        citation="Lai et al., Med-R1, arXiv 2503.13939; Hu et al., OmniMedVQA, arXiv 2402.09181",
        example="Splits/modality/train --images OmniMedVQA",
        folders=("Images",),
    ),
    "medvlm-r1": Source(
        title="the questions of MedVLM-R1",
        read=papers.read_medvlm_r1,
        license=_OMNIMED_TERMS,
        citation="Pan et al., MedVLM-R1, arXiv 2502.19634; Hu et al., OmniMedVQA, arXiv 2402.09181",
        example="MRI_CT_XRAY_300each_dataset.json --images OmniMedVQA --modality CT",
        folders=("Images", "images"),
    ),
    "vqa-rad": Source(
        title="VQA-RAD",
        read=vqa.read_vqa_rad,
        license="CC0 1.0, as its hub page says",
        citation="Lau et al., Scientific Data 2018",
        example="flaviagiammarino/vqa-rad --split test",
        folders=("images", "VQA_RAD Image Folder"),
    ),
    "slake": Source(
        title="SLAKE",
        read=vqa.read_slake,
        license="CC BY 4.0, as its hub page says",
        citation="Liu et al., SLAKE, ISBI 2021, arXiv 2102.09542",
        example="SLAKE --split test --lang en",
        folders=("imgs",),
    ),
    "path-vqa": Source(
        title="PathVQA",
        read=vqa.read_path_vqa,
        license="MIT, as its hub page says",
        citation="He et al., PathVQA, arXiv 2003.10286",
        example="flaviagiammarino/path-vqa --split test",
        folders=("images",),
    ),
    "pmc-vqa": Source(
        title="PMC-VQA, version 1, 2 or the clean test",
        read=benchmarks.read_pmc_vqa,
        license="CC BY-SA 4.0, as its hub page says; the figures have their articles' terms",
        citation="Zhang et al., PMC-VQA, arXiv 2305.10415",
        example="PMC-VQA/test_clean.csv --images PMC-VQA/images",
        folders=("images", "images_2", "figures"),
    ),
    "mmmu-med": Source(
        title="MMMU Health & Medicine",
        read=benchmarks.read_mmmu,
        license="Apache-2.0, as its hub page says",
        citation="Yue et al., MMMU, CVPR 2024, arXiv 2311.16502",
        example="MMMU/MMMU --split validation",
    ),
    "medxpertqa": Source(
        title="MedXpertQA-MM",
        read=benchmarks.read_medxpertqa,
        license="MIT, as its hub page says",
        citation="Zuo et al., MedXpertQA, arXiv 2501.18362",
        example="MedXpertQA/MM --split test --images MedXpertQA/images",
        folders=("images", "MM/images"),
    ),
    **{
        name: Source(
            title=f"rows in the format of {trainer}",
            read=trainers.read_trainer_rows,
            license=_AS_GIVEN,
            citation="",
            example=example,
        )
        for name, trainer, example in (
            ("trl", "TRL", "rows/data.parquet"),
            ("verl", "verl", "rows/data.parquet"),
            ("easyr1", "EasyR1", "rows/data.jsonl --images rows"),
            ("swift", "ms-swift", "rows/data.jsonl --images rows"),
            ("llamafactory", "LLaMA-Factory", "rows"),
            ("openai", "OpenAI's chat API", "rows/data.jsonl"),
        )
    },
}
