"""What OmniMedVQA's open-access files are called and how many questions each has, by modality.

Hu et al., CVPR 2024, arXiv 2402.09181: 42 files, 88,996 questions. The one question of ``Chest CT Scan`` whose row says
``modality`` for ``modality_type`` counts as CT here.
"""

MODALITIES = {
    "CT(Computed Tomography)": "CT",
    "MR (Mag-netic Resonance Imaging)": "MRI",
    "X-Ray": "X-Ray",
    "ultrasound": "Ultrasound",
    "Dermoscopy": "Dermoscopy",
    "Fundus Photography": "Fundus",
    "OCT (Optical Coherence Tomography": "OCT",
    "Microscopy Images": "Microscopy",
}
"""Their names, typos included -> ours."""

QUESTION_TYPES = (
    "Anatomy Identification",
    "Disease Diagnosis",
    "Lesion Grading",
    "Modality Recognition",
    "Other Biological Attributes",
)

DATASETS: dict[str, dict[str, int]] = {
    "RadImageNet": {"CT": 13829, "MRI": 31877, "Ultrasound": 10991},
    "SARS-CoV-2 CT-scan": {"CT": 910},
    "Chest CT Scan": {"CT": 871},
    "Covid CT": {"CT": 199},
    "RUS CHN": {"X-Ray": 1982},
    "Mura": {"X-Ray": 1464},
    "Chest X-Ray PA": {"X-Ray": 850},
    "Covid19 heywhale": {"X-Ray": 690},
    "CoronaHack": {"X-Ray": 684},
    "OCT & X-Ray 2017": {"X-Ray": 671, "OCT": 630},
    "Knee Osteoarthritis": {"X-Ray": 518},
    "COVIDx CXR-4": {"X-Ray": 485},
    "Pulmonary Chest Shenzhen": {"X-Ray": 296},
    "MIAS": {"X-Ray": 142},
    "Covid-19 tianchi": {"X-Ray": 96},
    "Pulmonary Chest MC": {"X-Ray": 38},
    "ISIC2019": {"Dermoscopy": 1952},
    "ISIC2020": {"Dermoscopy": 1580},
    "Fitzpatrick 17k": {"Dermoscopy": 1552},
    "ISBI2016": {"Dermoscopy": 681},
    "PAD-UFES-20": {"Dermoscopy": 479},
    "ISIC2018": {"Dermoscopy": 272},
    "Monkeypox Skin Image 2022": {"Dermoscopy": 163},
    "Diabetic Retinopathy": {"Fundus": 2051},
    "Yangxi": {"Fundus": 1515},
    "OLIVES": {"Fundus": 593},
    "PALM2019": {"Fundus": 510},
    "JSIEC": {"Fundus": 220},
    "ACRIMA": {"Fundus": 159},
    "DRIMDB": {"Fundus": 132},
    "DeepDRiD": {"Fundus": 131},
    "Adam Challenge": {"Fundus": 87},
    "Retinal OCT-C8": {"OCT": 4016},
    "CRC100k": {"Microscopy": 1322},
    "MHSMA": {"Microscopy": 1282},
    "Blood Cell": {"Microscopy": 1175},
    "BreakHis": {"Microscopy": 735},
    "BioMediTech": {"Microscopy": 511},
    "ALL Challenge": {"Microscopy": 342},
    "MAlig Lymph": {"Microscopy": 149},
    "HuSHeM": {"Microscopy": 89},
    "NLM- Malaria Data": {"Microscopy": 75},
}
"""Name of the file and of the data set -> our modality -> questions."""
