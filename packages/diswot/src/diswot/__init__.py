"""Search a student network without training, and know how far to trust the score."""

from diswot.budget import Budget
from diswot.ranking import Ranking, rank
from diswot.scoring import Score, TeacherCache, score
from diswot.searching import SearchResult, search

__all__ = ["Budget", "Ranking", "Score", "SearchResult", "TeacherCache", "rank", "score", "search"]
