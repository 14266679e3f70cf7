"""coati-bench: which way of training a chat model fits and is fastest on a cluster, and can the answer be believed?"""

__version__ = "0.1.0"
