"""References of the methods section, as BibTeX, and which of them a study needs."""

from __future__ import annotations

from nnunet_fedharm.study.study_file import StudyFile

ENTRIES = {
    "isensee2021nnunet": """@article{isensee2021nnunet,
  author  = {Isensee, Fabian and Jaeger, Paul F. and Kohl, Simon A. A. and Petersen, Jens and Maier-Hein, Klaus H.},
  title   = {{nnU-Net}: a self-configuring method for deep learning-based biomedical image segmentation},
  journal = {Nature Methods}, volume = {18}, number = {2}, pages = {203--211}, year = {2021},
  doi     = {10.1038/s41592-020-01008-z}
}""",
    "beutel2020flower": """@article{beutel2020flower,
  author  = {Beutel, Daniel J. and Topal, Taner and Mathur, Akhil and Qiu, Xinchi and Fernandez-Marques, Javier and Gao, Yan
             and Sani, Lorenzo and Li, Kwing Hei and Parcollet, Titouan and de Gusm{\\~a}o, Pedro Porto Buarque and Lane,
             Nicholas D.},
  title   = {Flower: A Friendly Federated Learning Research Framework},
  journal = {arXiv:2007.14390}, year = {2020}
}""",
    "mcmahan2017fedavg": """@inproceedings{mcmahan2017fedavg,
  author    = {McMahan, Brendan and Moore, Eider and Ramage, Daniel and Hampson, Seth and Ag{\\"u}era y Arcas, Blaise},
  title     = {Communication-Efficient Learning of Deep Networks from Decentralized Data},
  booktitle = {AISTATS}, year = {2017}
}""",
    "nyul2000": """@article{nyul2000,
  author  = {Ny{\\'u}l, L{\\'a}szl{\\'o} G. and Udupa, Jayaram K. and Zhang, Xuan},
  title   = {New variants of a method of {MRI} scale standardization},
  journal = {IEEE Transactions on Medical Imaging}, volume = {19}, number = {2}, pages = {143--150}, year = {2000}
}""",
    "zhu2017cyclegan": """@inproceedings{zhu2017cyclegan,
  author    = {Zhu, Jun-Yan and Park, Taesung and Isola, Phillip and Efros, Alexei A.},
  title     = {Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks},
  booktitle = {ICCV}, year = {2017}
}""",
    "lipman2023flow": """@inproceedings{lipman2023flow,
  author    = {Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian and Le, Matt},
  title     = {Flow Matching for Generative Modeling},
  booktitle = {ICLR}, year = {2023}
}""",
    "ouyang2023causality": """@article{ouyang2023causality,
  author  = {Ouyang, Cheng and Chen, Chen and Li, Surui and Li, Zeju and Qin, Chen and Bai, Wenjia and Rueckert, Daniel},
  title   = {Causality-Inspired Single-Source Domain Generalization for Medical Image Segmentation},
  journal = {IEEE Transactions on Medical Imaging}, year = {2023}
}""",
    "abadi2016dpsgd": """@inproceedings{abadi2016dpsgd,
  author    = {Abadi, Mart{\\'i}n and Chu, Andy and Goodfellow, Ian and McMahan, H. Brendan and Mironov, Ilya and Talwar, Kunal
               and Zhang, Li},
  title     = {Deep Learning with Differential Privacy},
  booktitle = {ACM CCS}, year = {2016}
}""",
    "wilcoxon1945": """@article{wilcoxon1945,
  author  = {Wilcoxon, Frank},
  title   = {Individual comparisons by ranking methods},
  journal = {Biometrics Bulletin}, volume = {1}, number = {6}, pages = {80--83}, year = {1945}
}""",
    "pratt1959": """@article{pratt1959,
  author  = {Pratt, John W.},
  title   = {Remarks on zeros and ties in the {Wilcoxon} signed rank procedures},
  journal = {Journal of the American Statistical Association}, volume = {54}, pages = {655--667}, year = {1959}
}""",
    "holm1979": """@article{holm1979,
  author  = {Holm, Sture},
  title   = {A simple sequentially rejective multiple test procedure},
  journal = {Scandinavian Journal of Statistics}, volume = {6}, number = {2}, pages = {65--70}, year = {1979}
}""",
    "schuirmann1987tost": """@article{schuirmann1987tost,
  author  = {Schuirmann, Donald J.},
  title   = {A comparison of the two one-sided tests procedure and the power approach for assessing the equivalence of average
             bioavailability},
  journal = {Journal of Pharmacokinetics and Biopharmaceutics}, volume = {15}, number = {6}, pages = {657--680}, year = {1987}
}""",
    "efron1993bootstrap": """@book{efron1993bootstrap,
  author    = {Efron, Bradley and Tibshirani, Robert J.},
  title     = {An Introduction to the Bootstrap},
  publisher = {Chapman \\& Hall}, year = {1993}
}""",
}
"""Key -> entry."""

BY_KIND = {
    "nyul": "nyul2000",
    "cyclegan": "zhu2017cyclegan",
    "diffusion": "lipman2023flow",
    "augment": "ouyang2023causality",
}


def keys_of(study: StudyFile) -> list[str]:
    """Keys of the entries that the study's methods cite, in the order of ENTRIES."""
    kinds = (*study.arms.harmonizers, *study.arms.baselines)
    cited = {"isensee2021nnunet", "wilcoxon1945", "pratt1959", "holm1979", "schuirmann1987tost", "efron1993bootstrap"}
    cited |= {BY_KIND[kind] for kind in kinds if kind in BY_KIND}
    if "federated" in study.arms.modes:
        cited |= {"beutel2020flower", "mcmahan2017fedavg"}
    if study.arms.epsilons:
        cited.add("abadi2016dpsgd")
    return [key for key in ENTRIES if key in cited]


def bibtex(study: StudyFile) -> str:
    """All entries that the study needs, with the study's own as the last one."""
    from nnunet_fedharm import __version__

    own = f"""@software{{nnunet_fedharm,
  author  = {{{{The nnunet\\_fedharm authors}}}},
  title   = {{nnunet\\_fedharm: federated {{MRI}} harmonization for {{nnU-Net}} v2}},
  version = {{{__version__}}}
}}"""
    return "\n\n".join([*(ENTRIES[key] for key in keys_of(study)), own]) + "\n"
