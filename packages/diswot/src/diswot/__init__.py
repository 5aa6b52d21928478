"""Search a student network without training, and know how far to trust the score."""

from typing import TYPE_CHECKING

from visionkernels.package import is_command

if TYPE_CHECKING or not is_command(__name__):
    from diswot.budget import Budget
    from diswot.ranking import Ranking, rank
    from diswot.scoring import Score, TeacherCache, score
    from diswot.searching import SearchResult, search

__all__ = ["Budget", "Ranking", "Score", "SearchResult", "TeacherCache", "rank", "score", "search"]
