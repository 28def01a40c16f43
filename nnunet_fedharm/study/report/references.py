"""References of the methods section, as BibTeX, and which of them a study needs."""

from __future__ import annotations

import re

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
    "wang2004ssim": """@article{wang2004ssim,
  author  = {Wang, Zhou and Bovik, Alan C. and Sheikh, Hamid R. and Simoncelli, Eero P.},
  title   = {Image Quality Assessment: From Error Visibility to Structural Similarity},
  journal = {IEEE Transactions on Image Processing}, volume = {13}, number = {4}, pages = {600--612}, year = {2004}
}""",
    "vangriethuysen2017radiomics": """@article{vangriethuysen2017radiomics,
  author  = {van Griethuysen, Joost J. M. and Fedorov, Andriy and Parmar, Chintan and Hosny, Ahmed and Aucoin, Nicole and
             Narayan, Vivek and Beets-Tan, Regina G. H. and Fillion-Robin, Jean-Christophe and Pieper, Steve and Aerts, Hugo J.
             W. L.},
  title   = {Computational Radiomics System to Decode the Radiographic Phenotype},
  journal = {Cancer Research}, volume = {77}, number = {21}, pages = {e104--e107}, year = {2017}
}""",
    "lin1989ccc": """@article{lin1989ccc,
  author  = {Lin, Lawrence I-Kuei},
  title   = {A concordance correlation coefficient to evaluate reproducibility},
  journal = {Biometrics}, volume = {45}, number = {1}, pages = {255--268}, year = {1989}
}""",
    "shrout1979icc": """@article{shrout1979icc,
  author  = {Shrout, Patrick E. and Fleiss, Joseph L.},
  title   = {Intraclass correlations: uses in assessing rater reliability},
  journal = {Psychological Bulletin}, volume = {86}, number = {2}, pages = {420--428}, year = {1979}
}""",
    "breiman2001forests": """@article{breiman2001forests,
  author  = {Breiman, Leo},
  title   = {Random Forests},
  journal = {Machine Learning}, volume = {45}, number = {1}, pages = {5--32}, year = {2001}
}""",
}
"""Key -> entry."""


def bibtex(methods: str) -> str:
    """The entries that the methods section cites, in the order of ENTRIES, with the study's own as the last one."""
    from nnunet_fedharm import __version__

    own = f"""@software{{nnunet_fedharm,
  author  = {{{{The nnunet\\_fedharm authors}}}},
  title   = {{nnunet\\_fedharm: federated {{MRI}} harmonization for {{nnU-Net}} v2}},
  version = {{{__version__}}}
}}"""
    cited = set(re.findall(r"@(\w+)", methods))
    return "\n\n".join([*(entry for key, entry in ENTRIES.items() if key in cited), own]) + "\n"
